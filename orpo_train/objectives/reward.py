"""A reward model: a scalar head that scores the better answer higher (Bradley and Terry 1952, Biometrika 39)."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_train.objectives.objective import Objective, PairLogps


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r(x, y_w) - r(x, y_l)) of scores [pairs] (equation 1 of Ouyang et al. 2022, arXiv 2203.02155).

    sigmoid(r_w - r_l) is the probability that y_w is preferred; scores have no zero point, only margins count.
    """
    return -logsigmoid(chosen - rejected)


def _loss(pairs: PairLogps, _: float) -> Tensor:
    return bradley_terry_loss(pairs.chosen, pairs.rejected)


REWARD = Objective(_loss, weight=None, supervised=False, scalar_head=True)
