"""From hidden states to token log-probabilities, without a full logits tensor.

Tokens are taken in chunks; each chunk's logits live only as long as it takes to read the target's log-probability.
The backward pass makes them again, so that nothing of size tokens x vocabulary is ever held.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 512


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, chunk: int
    ) -> Tensor:
        logps, normalisers = [], []
        cast_weight = weight.to(dtype)
        for part, goal in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            logits = _logits(part, cast_weight, bias)  # [chunk, V]
            normaliser = torch.logsumexp(logits, dim=-1)
            logps.append(logits.gather(1, goal[:, None]).squeeze(1) - normaliser)
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers))
        ctx.dtype, ctx.chunk = dtype, chunk
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        cast_weight = weight.to(ctx.dtype)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = _logits(hidden[rows], cast_weight, bias)
            # d logp / d logits = onehot(target) - softmax
            slope = logits.sub_(normalisers[rows, None]).exp_().mul_(-grad[rows, None])
            slope.scatter_add_(1, targets[rows, None], grad[rows, None])
            cast_slope = slope.to(ctx.dtype)
            grad_hidden[rows] = (cast_slope @ cast_weight).to(hidden.dtype)
            grad_weight += cast_slope.T @ hidden[rows].to(ctx.dtype)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _logits(hidden: Tensor, cast_weight: Tensor, bias: Tensor | None) -> Tensor:
    """[tokens, V]: the product in the weight's type, everything after it in fp32 (or float64)."""
    logits = hidden.to(cast_weight.dtype) @ cast_weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if bias is None else logits + bias


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk: int = CHUNK_TOKENS
) -> Tensor:
    """log p(target) at each position, [T] in fp32, with the exact gradient.

    Args:
        hidden: last hidden states at the positions that are read, [T, H].
        weight: the output embedding, [V, H].
        targets: token ids that follow these positions, [T].
        bias: of the output embedding, [V], if it has one.
        chunk: tokens whose logits exist at a time.

    Under autocast the matrix products run in autocast's type, as the head's own would.
    """
    dtype = weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    chunked: Callable[..., Tensor] = _ChunkedLogprobs.apply
    with torch.autocast(hidden.device.type, enabled=False):
        return chunked(hidden, weight, bias, targets, dtype, chunk)
