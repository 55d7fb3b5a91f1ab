"""Odds from log-probabilities, exact and with a finite gradient for every input."""

import torch
from torch import Tensor

LARGEST_LOGP = -1e-6
"""log P is held at or below this: P = 1 has infinite odds. In fp32 1 - exp(-1e-6) still has one significant digit."""

LOG_HALF = -0.6931471805599453


def full_precision(x: Tensor) -> Tensor:
    """In fp32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact near 0 and far from it (Maechler 2012), with a finite gradient everywhere.

    At x > LARGEST_LOGP the value is that of LARGEST_LOGP and the gradient 0. Both branches of the split are finite
    after the clamp, so that `torch.where` cannot turn the one not taken into a NaN gradient.
    """
    x = full_precision(x).clamp(max=LARGEST_LOGP)
    return torch.where(x > LOG_HALF, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P (equation 4 of arXiv 2403.07691)."""
    logp = full_precision(logp).clamp(max=LARGEST_LOGP)
    return logp - log1mexp(logp)
