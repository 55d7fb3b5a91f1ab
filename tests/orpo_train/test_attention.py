"""Attention over packed trees against attention over one full mask, written down token by token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_train.attention import (
    Branches,
    UnsupportedAttentionError,
    branch_numbers,
    causal_mask,
    flex_trees,
    sdpa_trees,
)

TREES = st.lists(
    st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple), min_size=1, max_size=4
).map(tuple)  # fmt: skip
BOTH = pytest.mark.parametrize("attend", [sdpa_trees, flex_trees])


def _full_mask(lengths: tuple[tuple[int, ...], ...], window: int | None) -> torch.Tensor:
    """[T, T] by walking over the tokens: of each its tree, its branch and its position."""
    tokens = []
    for tree, (prompt, *responses) in enumerate(lengths):
        tokens += [(tree, 0, position) for position in range(prompt)]
        for branch, response in enumerate(responses, 1):
            tokens += [(tree, branch, prompt + position) for position in range(response)]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (tree, branch, position) in enumerate(tokens):
        for k, (other, place, earlier) in enumerate(tokens):
            before = other == tree and place in (0, branch) and earlier <= position
            mask[q, k] = before and (window is None or position - earlier < window)
    return mask


def _states(tokens: int, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(1, heads, tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


def _by_full_mask(states: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    query, key, value = states
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@BOTH
@settings(max_examples=30)
@given(lengths=TREES, window=st.one_of(st.none(), st.integers(1, 6)), seed=st.integers(0, 100))
def test_equals_attention_with_the_full_mask(
    attend: Callable[..., Any], lengths: tuple[tuple[int, ...], ...], window: int | None, seed: int
) -> None:
    states = _states(sum(map(sum, lengths)), seed)
    if attend is flex_trees:
        states = [state.detach() for state in states]  # on a CPU it has no backward pass
    expected = _by_full_mask(states, _full_mask(lengths, window))
    out, _ = attend(None, *states, None, branches=Branches(lengths), scaling=8**-0.5, sliding_window=window)
    torch.testing.assert_close(out, expected)
    if attend is sdpa_trees:
        direction = torch.randn_like(expected)
        ours = torch.autograd.grad((out * direction).sum(), states)
        theirs = torch.autograd.grad((expected * direction).sum(), states)
        torch.testing.assert_close(ours, theirs)


def test_causal_mask_by_hand() -> None:
    """Two tokens after a prompt of three: the second sees all but what a window of three leaves behind."""
    cpu = torch.device("cpu")
    assert causal_mask(3, 2, None, cpu).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert causal_mask(3, 2, 3, cpu).int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_branch_numbers_as_their_docstring_says() -> None:
    tree, branch, position = branch_numbers(((2, 1), (1, 1, 2)))
    assert tree.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert branch.tolist() == [0, 0, 1, 0, 1, 2, 2]
    assert position.tolist() == [0, 1, 2, 0, 1, 1, 2]


def test_masks_are_made_once_for_all_layers() -> None:
    branches = Branches(((3, 2, 2),))
    states = _states(7, 0)
    for _ in range(3):
        sdpa_trees(None, *states, None, branches=branches)  # type: ignore[arg-type]
    assert len(branches._made) == 1


@BOTH
@pytest.mark.parametrize("asked", ["softcap", "s_aux", "position_bias"])
def test_what_is_not_offered_is_refused(attend: Callable[..., Any], asked: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match=asked):
        attend(None, *_states(2, 0), None, branches=Branches(((1, 1),)), **{asked: 5.0})


def test_flex_has_no_dropout() -> None:
    with pytest.raises(UnsupportedAttentionError, match="dropout"):
        flex_trees(None, *_states(2, 0), None, branches=Branches(((1, 1),)), dropout=0.1)  # type: ignore[arg-type]
