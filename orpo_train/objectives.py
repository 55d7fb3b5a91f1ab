"""The losses: pure functions of log-probabilities, one value for each pair, nothing reduced and nothing logged.

log P(y|x) is the mean over the m response tokens of log p(y_t | x, y_<t): the geometric mean of the paper
(Hong, Lee, Thorne 2024, arXiv 2403.07691, section 4.1). All functions compute in fp32 (float64 stays float64).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST_LOGP = -1e-6
"""log P is held at or below this: P = 1 has infinite odds. In fp32 1 - exp(-1e-6) still has one significant digit."""

LOG_HALF = -0.6931471805599453


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact near 0 and far from it (Maechler 2012), with a finite gradient everywhere.

    At x > LARGEST_LOGP the value is that of LARGEST_LOGP and the gradient 0. Both branches of the split are finite
    after the clamp, so that `torch.where` cannot turn the one not taken into a NaN gradient.
    """
    x = _full_precision(x).clamp(max=LARGEST_LOGP)
    return torch.where(x > LOG_HALF, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P (equation 4)."""
    logp = _full_precision(logp).clamp(max=LARGEST_LOGP)
    return logp - log1mexp(logp)


def odds_ratio_loss(chosen_logp: Tensor, rejected_logp: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)) (equation 7), from mean log-probabilities [pairs]."""
    return -logsigmoid(log_odds(chosen_logp) - log_odds(rejected_logp))


@dataclass(frozen=True)
class OrpoLoss:
    """Each of shape [pairs], fp32. The names are those TRL logs; `loss` alone carries the gradient that matters."""

    loss: Tensor  # nll + lambda * -log_odds_ratio
    nll: Tensor
    log_odds_ratio: Tensor  # log sigmoid of the log odds ratio, <= 0
    log_odds_chosen: Tensor  # the log odds ratio itself, > 0 when the chosen answer has the better odds


def orpo_loss(nll: Tensor, chosen_logp: Tensor, rejected_logp: Tensor, lambda_: float) -> OrpoLoss:
    """L = L_SFT + lambda * L_OR for each pair (equation 6).

    Args:
        nll: supervised loss of the chosen answer, [pairs]; the paper's is `-chosen_logp`.
        chosen_logp, rejected_logp: mean log-probability of the response tokens, [pairs], <= 0.
        lambda_: weight of the odds ratio loss.

    >>> half = torch.tensor([0.5]).log()
    >>> orpo_loss(-half, half, half, lambda_=0.1).loss   # log 2 + 0.1 * log 2
    tensor([0.7625])
    """
    log_odds_chosen = log_odds(chosen_logp) - log_odds(rejected_logp)
    log_odds_ratio = logsigmoid(log_odds_chosen)
    nll = _full_precision(nll)
    return OrpoLoss(nll - lambda_ * log_odds_ratio, nll, log_odds_ratio, log_odds_chosen)
