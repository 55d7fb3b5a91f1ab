"""The course of the learning rate, as a factor of its peak."""

import math
from collections.abc import Callable

Decay = Callable[[int, int, int], float]
"""From step, warmup and total steps to the factor after warmup."""


def _progress(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


DECAYS: dict[str, Decay] = {
    "constant": lambda step, warmup, total: 1.0,
    "linear": lambda step, warmup, total: max(0.0, 1.0 - _progress(step, warmup, total)),
    "cosine": lambda step, warmup, total: 0.5 * (1.0 + math.cos(math.pi * min(1.0, _progress(step, warmup, total)))),
    "inverse_sqrt": lambda step, warmup, total: math.sqrt(max(1, warmup) / max(1, warmup, step)),
}


def learning_rate_factor(schedule: str, step: int, warmup: int, total: int) -> float:
    """The factor for optimizer step `step` (from 0): linear from above 0 to 1 over `warmup` steps, then the decay."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return DECAYS[schedule](step, warmup, total)
