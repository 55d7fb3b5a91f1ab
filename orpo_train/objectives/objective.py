"""What an objective is: a pure function of the log-probabilities of pairs, and what it declares it needs of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """B pairs as an objective sees them, each [B] in fp32."""

    nll: Tensor  # supervised loss of the chosen answer; its mean over the global batch is L_SFT
    chosen: Tensor  # mean log-probability of the response's tokens, log P(y_w|x) <= 0; of a scalar head, its score
    rejected: Tensor  # log P(y_l|x); NaN where the objective does not need it, so that it cannot be used unseen


Rewards = Callable[[PairLogps], tuple[Tensor, Tensor]]


def mean_logps(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    return pairs.chosen, pairs.rejected


@dataclass(frozen=True)
class Objective:
    """A loss for each pair; the loss of a batch is their mean."""

    loss: Callable[[PairLogps, float], Tensor]  # (pairs, weight) -> [B]; nothing reduced, nothing logged
    needs_rejected: bool = True  # otherwise only the chosen answers go through the model
    weight: Literal["lambda"] | None = "lambda"  # the setting that `loss` gets, and that rewards are multiplied with
    rewards: Rewards = mean_logps  # what the metrics call the rewards of chosen and rejected, before the weight
    supervised: bool = True  # L_SFT is part of the loss
    scalar_head: bool = False  # the model ends in one score for a sequence, not in a vocabulary
