"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347), and what language models add to it.

Functions of tokens, not of pairs: `orpo_train.ppo` puts them together.
"""

import torch
from torch import Tensor

KL_STEP, KL_MOST = 0.1, 0.2  # of the adaptive weight


def gae(rewards: Tensor, values: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Generalized advantages of one answer's tokens, [T] (arXiv 1506.02438, equation 16).

    delta_t = r_t + gamma V_(t+1) - V_t, and A_t = delta_t + gamma lambda A_(t+1). Nothing comes after the last token,
    not even where the answer was cut at its bound.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.cat([values[1:], values.new_zeros(1)])
    deltas = rewards + gamma * following - values
    later = values.new_zeros(())
    for t in reversed(range(len(rewards))):
        later = advantages[t] = deltas[t] + gamma * lambda_ * later
    return advantages


def whitened(values: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all tokens of the step, so that the size of scores does not set the pace."""
    return (values - values.mean()) / (values.var(unbiased=False) + 1e-8).sqrt()


def clipped_loss(logps: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) of each token, [K] (arXiv 1707.06347, equation 7)."""
    ratio = (logps - old).exp()
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """(V - R)^2 / 2 of each token, [K]; a value that leaves `old` by more than `clip` wins nothing by it."""
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2


def adapted(kl_weight: float, kl: float, target: float) -> float:
    """The weight after a step whose answers had this KL (arXiv 1909.08593, section 2.2)."""
    return kl_weight * (1 + KL_STEP * min(max(kl / target - 1, -KL_MOST), KL_MOST))
