"""Unlikelihood training (Welleck et al. 2020, arXiv 1908.04319), which ORPO's paper builds on in section 3.1."""

from torch import Tensor

from orpo_train.objectives.objective import Objective, PairLogps


def _loss(pairs: PairLogps, lambda_: float) -> Tensor:
    """L_SFT - lambda * (1/m) sum_t log(1 - p(y_t|x, y_<t)) over the rejected answer's tokens.

    The penalty is equation 5 with each token of the rejected answer as its own negative candidate. Unlike the odds
    ratio it looks at one side alone: it goes on pushing a rejected answer down when the chosen one has long won.
    """
    return pairs.nll + lambda_ * pairs.rejected_unlikelihood


UNLIKELIHOOD = Objective(_loss)
