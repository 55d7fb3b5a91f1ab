"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306): answers judged one by one, not in pairs."""

from torch import Tensor

from orpo_train.objectives.objective import Objective, PairLogps, log_ratios


def kto_loss(ratio: Tensor, kl: Tensor, beta: float, *, desirable: bool) -> Tensor:
    """1 - sigmoid(beta * (ratio - kl)) of desirable answers, 1 - sigmoid(beta * (kl - ratio)) of others, [answers].

    Equations 7 and 8 with lambda_D = lambda_U = 1, as pairs have as many of both. `kl` is the reference point z_0.

    The paper estimates z_0 from answers put to other prompts of the same micro-batch, so its loss changes with the
    size of a micro-batch. Here each prompt has one such answer for good (the dataset's `kl_input_ids`), and z_0 is
    their mean over the global batch, held at 0 or above: the same number however the batch is cut.
    """
    gain = ratio - kl if desirable else kl - ratio
    return 1 - (beta * gain).sigmoid()


def _loss(pairs: PairLogps, beta: float) -> Tensor:
    """A pair is two examples; its loss is their mean."""
    chosen = kto_loss(pairs.chosen_ratio, pairs.kl, beta, desirable=True)
    rejected = kto_loss(pairs.rejected_ratio, pairs.kl, beta, desirable=False)
    return (chosen + rejected) / 2


KTO = Objective(_loss, needs_reference=True, needs_kl=True, weight="beta", rewards=log_ratios, supervised=False)
