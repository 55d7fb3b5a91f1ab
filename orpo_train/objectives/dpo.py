"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290): a reward model that is the policy itself."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_train.objectives.objective import Objective, PairLogps, log_ratios


def dpo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * (ratio_w - ratio_l)) (equation 7), where ratio = log pi(y|x) - log pi_ref(y|x), [pairs].

    >>> dpo_loss(torch.tensor([1.0]), torch.tensor([1.0]), beta=0.1)   # log 2
    tensor([0.6931])
    """
    return -logsigmoid(beta * (chosen_ratio - rejected_ratio))


def _loss(pairs: PairLogps, beta: float) -> Tensor:
    return dpo_loss(pairs.chosen_ratio, pairs.rejected_ratio, beta)


DPO = Objective(_loss, needs_reference=True, weight="beta", rewards=log_ratios, supervised=False)
