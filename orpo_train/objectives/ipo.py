"""Identity preference optimization (Azar et al. 2023, arXiv 2310.12036): a margin to reach, and no more than that."""

from torch import Tensor

from orpo_train.objectives.objective import Objective, PairLogps, log_ratios


def ipo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, tau: float) -> Tensor:
    """(ratio_w - ratio_l - 1 / (2 tau))^2 (equation 17), [pairs].

    Ratios are means over each answer's tokens here, as in the paper's experiments: sums would ask the same margin of
    a sentence and of a page.
    """
    return (chosen_ratio - rejected_ratio - 1 / (2 * tau)) ** 2


def _loss(pairs: PairLogps, beta: float) -> Tensor:
    chosen, rejected = pairs.chosen_ratio / pairs.chosen_tokens, pairs.rejected_ratio / pairs.rejected_tokens
    return ipo_loss(chosen, rejected, tau=beta)


IPO = Objective(_loss, needs_reference=True, weight="beta", rewards=log_ratios, supervised=False)
