"""The paper's ablation: the ratio of the probabilities in place of their odds (arXiv 2403.07691, section 7.1)."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_train.objectives.objective import Objective, PairLogps


def _loss(pairs: PairLogps, lambda_: float) -> Tensor:
    """L_SFT - lambda * log sigmoid(log P(y_w|x) - log P(y_l|x))."""
    return pairs.nll - lambda_ * logsigmoid(pairs.chosen - pairs.rejected)


PROBABILITY_RATIO = Objective(_loss)
