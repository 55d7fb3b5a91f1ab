"""From hidden states to token log-probabilities, without a full logits tensor.

Tokens are taken in chunks; each chunk's logits live only as long as it takes to read the target's log-probability.
The backward pass makes them again, so that nothing of size tokens x vocabulary is ever held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK_LOGITS = 2**23
"""Logits that exist at a time: 32 MiB in fp32."""
TOKEN_MULTIPLE = 32
"""Tokens are filled up to a multiple: matrix libraries keep compiled bf16 kernels for each size they meet."""


@dataclass(frozen=True)
class HeadShape:
    """What an architecture does to the product of hidden state and output embedding: cap * tanh(scale * z / cap)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """From a transformers configuration (Cohere and Granite scale their logits, Gemma caps them)."""
        factor = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(factor / divisor, getattr(config, "final_logit_softcapping", None))

    def logits(self, products: Tensor) -> Tensor:
        """In place, of products in full precision."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        return products if self.cap is None else products.div_(self.cap).tanh_().mul_(self.cap)

    def derivative(self, logits: Tensor) -> Tensor | float:
        """d logits / d products, from the logits."""
        return self.scale if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: HeadShape,
        dtype: torch.dtype,
        chunk: int,
    ) -> Tensor:
        logps, normalisers = [], []
        cast_weight = weight.to(dtype)
        for part, goal in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            logits = shape.logits(_products(part, cast_weight, bias))  # [chunk, V]
            target = logits.gather(1, goal[:, None]).squeeze(1)
            # torch.logsumexp makes copies of the logits, and takes many times as long on a CPU
            peak = logits.amax(dim=-1)
            normaliser = logits.sub_(peak[:, None]).exp_().sum(dim=-1).log_().add_(peak)
            logps.append(target - normaliser)
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers))
        ctx.shape, ctx.dtype, ctx.chunk = shape, dtype, chunk
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight) if of_weight else None
        grad_bias = torch.zeros_like(bias) if of_bias else None
        cast_weight = weight.to(ctx.dtype)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = ctx.shape.logits(_products(hidden[rows], cast_weight, bias))
            derivative = ctx.shape.derivative(logits)
            # d logp / d logits = onehot(target) - softmax
            slope = logits.sub_(normalisers[rows, None]).exp_().mul_(-grad[rows, None])
            slope.scatter_add_(1, targets[rows, None], grad[rows, None])
            if ctx.shape != HeadShape():
                slope.mul_(derivative)
            cast_slope = slope.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (cast_slope @ cast_weight).to(hidden.dtype)
            if grad_weight is not None and grad_weight.dtype == ctx.dtype:
                grad_weight.addmm_(cast_slope.T, hidden[rows].to(ctx.dtype))
            elif grad_weight is not None:
                grad_weight += cast_slope.T @ hidden[rows].to(ctx.dtype)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _products(hidden: Tensor, cast_weight: Tensor, bias: Tensor | None) -> Tensor:
    """[tokens, V]: the product in the weight's type, everything after it in fp32 (or float64)."""
    products = hidden.to(cast_weight.dtype) @ cast_weight.T
    products = products if products.dtype == torch.float64 else products.float()
    return products if bias is None else products + bias


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    shape: HeadShape | None = None,
    chunk: int | None = None,
) -> Tensor:
    """log p(target) at each position, [T] in fp32, with the exact gradient.

    Args:
        hidden: last hidden states at the positions that are read, [T, H].
        weight: the output embedding, [V, H].
        targets: token ids that follow these positions, [T].
        bias: of the output embedding, [V], if it has one.
        shape: scale and cap of the logits, if the architecture has them.
        chunk: tokens whose logits exist at a time; by default as many as make CHUNK_LOGITS.

    Under autocast the matrix products run in autocast's type, as the head's own would.
    """
    dtype = weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    chunk = chunk or max(TOKEN_MULTIPLE, CHUNK_LOGITS // len(weight) // TOKEN_MULTIPLE * TOKEN_MULTIPLE)
    tokens, extra = len(targets), -len(targets) % TOKEN_MULTIPLE
    hidden, targets = pad(hidden, (0, 0, 0, extra)), pad(targets, (0, extra))
    chunked: Callable[..., Tensor] = _ChunkedLogprobs.apply
    with torch.autocast(hidden.device.type, enabled=False):
        return chunked(hidden, weight, bias, targets, shape or HeadShape(), dtype, chunk)[:tokens]
