"""Chunked log-probabilities against log_softmax and gather."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_train.logprobs import HeadShape, token_logprobs

TOKENS, HIDDEN, WORDS = 11, 5, 17


def _inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype, requires_grad=True)

    hidden, weight = draw(TOKENS, HIDDEN), draw(WORDS, HIDDEN)
    return hidden, weight, torch.randint(WORDS, (TOKENS,), generator=random), draw(WORDS) if bias else None


def _naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, shape: HeadShape | None = None
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if shape is not None:
        logits = logits * shape.scale
        logits = logits if shape.cap is None else torch.tanh(logits / shape.cap) * shape.cap
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@given(
    chunk=st.integers(1, TOKENS + 3),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.125, 3.0]),
    cap=st.sampled_from([None, 1.0, 30.0]),
)
def test_value_and_gradient_at_any_chunk_size(chunk: int, bias: bool, scale: float, cap: float | None) -> None:
    hidden, weight, targets, offset = _inputs(bias=bias)
    given_grad = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
    shape = HeadShape(scale, cap)
    ours = token_logprobs(hidden, weight, targets, offset, shape, chunk)
    theirs = _naive(hidden, weight, targets, offset, shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for mine, reference in zip(
        torch.autograd.grad(ours, leaves, given_grad), torch.autograd.grad(theirs, leaves, given_grad), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool) -> None:
    hidden, weight, targets, offset = _inputs(bias=bias)
    function: Callable[..., Tensor] = lambda h, w, *b: token_logprobs(h, w, targets, *b, chunk=4)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight, *([offset] if offset is not None else [])))


def test_far_logits_do_not_overflow() -> None:
    hidden, weight, targets, _ = _inputs(torch.float32, bias=False)
    logps = token_logprobs(hidden * 1e4, weight, targets)
    torch.testing.assert_close(logps, _naive(hidden * 1e4, weight, targets))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(logps.sum(), (hidden, weight)))


class _Products(TorchDispatchMode):
    """Records the type of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            self.dtypes += [args[-2].dtype, args[-1].dtype]
        return func(*args, **kwargs or {})


def test_autocast_runs_products_in_bf16_and_the_rest_in_fp32() -> None:
    hidden, weight, targets, bias = _inputs(torch.float32)
    with _Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            logps = token_logprobs(hidden, weight, targets, bias, chunk=16)
        logps.sum().backward()
    assert set(products.dtypes) == {torch.bfloat16}
    assert len(products.dtypes) == 2 * 2 * 4  # two operands; two chunks of the 32 tokens; logits twice, two gradients
    assert logps.dtype == torch.float32
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).float() + bias
    torch.testing.assert_close(logps, rounded.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    for leaf in (hidden, weight, bias):
        assert leaf is not None
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32


def test_without_autocast_products_stay_in_fp32() -> None:
    hidden, weight, targets, _ = _inputs(torch.float32)
    with _Products() as products:
        token_logprobs(hidden, weight, targets).sum().backward()
    assert set(products.dtypes) == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, HeadShape()),
        ({"logit_scale": 0.25}, HeadShape(0.25)),  # Cohere
        ({"logits_scaling": 8.0}, HeadShape(0.125)),  # Granite
        ({"final_logit_softcapping": 30.0}, HeadShape(1.0, 30.0)),  # Gemma
        ({"final_logit_softcapping": None}, HeadShape()),
    ],
)
def test_the_head_of_an_architecture(settings: dict[str, float | None], expected: HeadShape) -> None:
    assert HeadShape.of(SimpleNamespace(**settings)) == expected


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen: str) -> None:
    hidden, weight, targets, bias = _inputs(torch.float32)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    assert leaves[frozen] is not None
    leaves[frozen].requires_grad_(False)  # type: ignore[union-attr]
    with _Products() as products:
        token_logprobs(hidden, weight, targets, bias).sum().backward()
    assert len(products.dtypes) == 2 * (4 if frozen == "bias" else 3)
    assert [name for name, leaf in leaves.items() if leaf is not None and leaf.grad is None] == [frozen]


def test_no_tensor_of_all_logits_exists() -> None:
    """The largest tensor made on the way is a chunk of logits, or a weight."""
    tokens, words, chunk = 64, 50, 8
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            made = func(*args, **kwargs or {})
            largest = max(largest, made.numel() if isinstance(made, Tensor) else 0)
            return made

    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(words, 4, requires_grad=True)
    with Largest():
        token_logprobs(hidden, weight, torch.zeros(tokens, dtype=torch.int64), chunk=chunk).sum().backward()
    assert largest == chunk * words
