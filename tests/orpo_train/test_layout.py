"""How trees lie in memory, by hand, and what both layouts must have in common."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import ANSWERS
from orpo_train.attention import branch_numbers
from orpo_train.batching import Limits, PairDataset, grow_trees, tree_of
from orpo_train.layout import Collate, collate_packed, collate_plain

MakeTable = Callable[..., pa.Table]
BOTH = pytest.mark.parametrize("collate", [collate_packed, collate_plain])
ONE = [([7, 8], [3, 2], [5])]


def test_packed_as_its_docstring_says(make_table: MakeTable) -> None:
    data = PairDataset(make_table(ONE))
    batch = collate_packed(data, [tree_of(data, [0], ANSWERS)])
    assert batch.input_ids.tolist() == [[7, 8, 3, 2, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.positions.tolist() == [1, 2, 1]
    assert batch.targets.tolist() == [3, 2, 5]
    assert batch.segment.tolist() == [1, 1, 2]
    assert (batch.prompt.tolist(), batch.chosen.tolist(), batch.rejected.tolist()) == ([0], [1], [2])
    assert batch.branches is not None
    assert batch.branches.lengths == ((2, 2, 1),)
    assert batch.attention_mask is None


def test_plain_as_its_docstring_says(make_table: MakeTable) -> None:
    data = PairDataset(make_table(ONE))
    batch = collate_plain(data, [tree_of(data, [0], ANSWERS)])
    assert batch.input_ids.tolist() == [[7, 8, 3, 2], [7, 8, 5, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.positions.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [3, 2, 5]
    assert batch.segment.tolist() == [1, 1, 2]
    assert batch.branches is None


def test_several_pairs_share_a_prompt_and_a_response(make_table: MakeTable) -> None:
    data = PairDataset(make_table([([7, 8], [1], [2]), ([7, 8], [1], [3, 3]), ([9], [1], [2])]))
    batch = collate_packed(data, grow_trees(data, range(3), ANSWERS, Limits(100)))
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 3, 3, 9, 1, 2]]
    assert batch.prompt.tolist() == [0, 0, 4]
    assert batch.chosen.tolist() == [1, 1, 5]
    assert batch.rejected.tolist() == [2, 3, 6]
    assert batch.segments == 7


@BOTH
def test_scope_with_prompt_reads_the_prompt_once(make_table: MakeTable, collate: Collate) -> None:
    data = PairDataset(make_table([([7, 8], [3, 2], [5]), ([4], [1], [2])]))
    batch = collate(data, [tree_of(data, [pair], ANSWERS) for pair in (0, 1)], "prompt+response")
    assert batch.targets.tolist() == [8, 3, 2, 5, 1, 2]
    assert batch.segment.tolist() == [0, 1, 1, 2, 4, 5]


@BOTH
def test_chosen_alone(make_table: MakeTable, collate: Collate) -> None:
    data = PairDataset(make_table(ONE))
    batch = collate(data, [tree_of(data, [0], ANSWERS[:1])], "response")
    assert (batch.targets.tolist(), batch.rejected.tolist()) == ([3, 2], [])


@BOTH
@given(st.integers(0, 2**32), st.sampled_from(["response", "prompt+response"]))
def test_masks_follow_from_lengths_never_from_token_values(
    make_table: MakeTable, collate: Collate, seed: int, scope: str
) -> None:
    """The same shape of batch whether responses are made of random tokens or of nothing but zeros and ends."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 6, (4, 3))

    def batch(tokens: list[int]):  # type: ignore[no-untyped-def]
        draw = [[random.choice(tokens, n).tolist() for n in row] for row in lengths]
        data = PairDataset(make_table([tuple(row) for row in draw]))
        trees = [tree_of(data, [pair], ANSWERS) for pair in range(4)]
        if any(len(tree.responses) < 2 for tree in trees):
            return None  # two equal answers lie in memory once
        return collate(data, trees, scope)  # type: ignore[arg-type]

    ordinary, special = batch([9, 10, 11, 12, 13]), batch([0, 1, 2])
    if ordinary is None or special is None:
        return
    for name in ("position_ids", "positions", "segment", "prompt", "chosen", "rejected"):
        assert torch.equal(getattr(ordinary, name), getattr(special, name))
    in_response = lengths[:, 1:].sum()
    assert len(special.targets) == in_response + ((lengths[:, 0] - 1).sum() if scope == "prompt+response" else 0)


@given(seed=st.integers(0, 1000), scope=st.sampled_from(["response", "prompt+response"]))
def test_both_layouts_read_the_same_targets(make_table: MakeTable, seed: int, scope: str) -> None:
    data = PairDataset(make_table(5, seed=seed))
    trees = [tree_of(data, [pair], ANSWERS) for pair in range(5)]
    packed, plain = (collate(data, trees, scope) for collate in (collate_packed, collate_plain))  # type: ignore[arg-type]
    for name in ("targets", "segment", "prompt", "chosen", "rejected"):
        assert torch.equal(getattr(packed, name), getattr(plain, name))
    for batch in (packed, plain):  # what is read stands at the position before its target, in the row's own count
        own = batch.position_ids.flatten()[batch.positions]
        tokens = data.nll_tokens(np.arange(5), scope)
        assert len(own) == tokens + sum(len(data.response(pair, "rejected")) for pair in range(5))


@given(seed=st.integers(0, 1000))
def test_positions_are_those_of_the_branches(make_table: MakeTable, seed: int) -> None:
    data = PairDataset(make_table(5, seed=seed))
    batch = collate_packed(data, [tree_of(data, [pair], ANSWERS) for pair in range(5)])
    assert batch.branches is not None
    assert torch.equal(branch_numbers(batch.branches.lengths)[2], batch.position_ids[0])


def test_nll_tokens_count_what_is_read(make_table: MakeTable) -> None:
    data, pairs = PairDataset(make_table(9)), np.array([2, 5, 7])
    trees = [tree_of(data, [int(pair)], ANSWERS) for pair in pairs]
    for scope in ("response", "prompt+response"):
        batch = collate_packed(data, trees, scope)  # type: ignore[arg-type]
        covered = torch.cat([batch.prompt, batch.chosen])
        assert data.nll_tokens(pairs, scope) == int(torch.isin(batch.segment, covered).sum())
