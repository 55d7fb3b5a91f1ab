"""What an objective is: a pure function of the log-probabilities of pairs, and what it declares it needs of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """B pairs as an objective sees them, each [B] in fp32.

    What an objective has not declared to need is NaN, so that it cannot be used unseen. Under a scalar head `chosen`
    and `rejected` are scores.
    """

    nll: Tensor  # supervised loss of the chosen answer; its mean over the global batch is L_SFT
    chosen: Tensor  # mean log-probability of the response's tokens, log P(y_w|x) <= 0
    rejected: Tensor  # log P(y_l|x)
    chosen_tokens: Tensor  # tokens of the response
    rejected_tokens: Tensor
    rejected_unlikelihood: Tensor  # mean over the response's tokens of -log(1 - p(y_t|x, y_<t)) >= 0
    chosen_ratio: Tensor  # log pi(y_w|x) - log pi_ref(y_w|x), summed over the response's tokens
    rejected_ratio: Tensor
    kl: Tensor  # the global batch's estimate of KL(pi || pi_ref) >= 0, the same for each pair, without gradient


Rewards = Callable[[PairLogps], tuple[Tensor, Tensor]]


def mean_logps(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    return pairs.chosen, pairs.rejected


def log_ratios(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """The implicit rewards of arXiv 2305.18290, equation 5, over beta and up to a term of the prompt alone."""
    return pairs.chosen_ratio, pairs.rejected_ratio


@dataclass(frozen=True)
class Objective:
    """A loss for each pair; the loss of a batch is their mean."""

    loss: Callable[[PairLogps, float], Tensor]  # (pairs, weight) -> [B]; nothing reduced, nothing logged
    needs_rejected: bool = True  # otherwise only the chosen answers go through the model
    needs_reference: bool = False  # the dataset has the log-probabilities of a reference model
    needs_kl: bool = False  # each step also runs answers to other prompts, to see how far the model has moved
    weight: Literal["lambda", "beta"] | None = "lambda"  # the setting that `loss` gets; rewards are multiplied with it
    rewards: Rewards = mean_logps  # what the metrics call the rewards of chosen and rejected, before the weight
    supervised: bool = True  # L_SFT is part of the loss
    scalar_head: bool = False  # the model ends in one score for a sequence, not in a vocabulary
