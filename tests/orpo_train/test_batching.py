"""Which pairs make a global batch, which trees they form, and which of them run together."""

from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.errors import OrpoError
from orpo_data.schema import ANSWERS
from orpo_train.batching import (
    BatchOrder,
    Limits,
    PairDataset,
    Tree,
    batches_per_epoch,
    by_length,
    check_limits,
    cut,
    grow_trees,
    micro_batches,
    pack,
    tree_of,
)

MakeTable = Callable[..., pa.Table]
SHARED = [
    ([7, 8], [1], [2]),
    ([7, 8], [1], [3, 3]),
    ([7, 8], [3, 3], [2]),
    ([7, 9], [1], [2]),
    ([7], [8, 1], [2]),
    ([7, 8], [1], [2]),
]
"""Three pairs of one prompt, then others; the last has the first's prompt again, but lies elsewhere."""


def test_dataset_figures(make_table: MakeTable) -> None:
    data = PairDataset(make_table([([7, 8], [3, 2], [5]), ([1], [2], [599])]))
    assert (len(data), data.tokens, data.longest, data.largest_id) == (2, 4 + 3 + 2 + 2, 4, 599)
    assert data.ids(1, "rejected").tolist() == [1, 599]
    assert data.prompt(0).tolist() == [7, 8]
    assert data.response(0, "chosen").tolist() == [3, 2]
    assert data.row_ids([1, 0]) == ["pair-1", "pair-0"]


def test_a_part_of_a_table_and_several_chunks_read_the_same_rows(make_table: MakeTable) -> None:
    whole = PairDataset(make_table(8))
    pieces = pa.concat_tables([make_table(8).slice(2, 3), make_table(8).slice(5, 2)])
    for table in (make_table(8).slice(2, 5), pieces):
        part = PairDataset(table)
        assert [part.ids(i, "chosen").tolist() for i in range(5)] == [
            whole.ids(i, "chosen").tolist() for i in range(2, 7)
        ]
        assert part.tokens == sum(whole.lengths[side][2:7].sum() for side in ("chosen", "rejected"))


def test_tokens_are_read_where_they_lie(make_table: MakeTable) -> None:
    """Several record batches, as every shard has them: rows are views, so memory does not grow with the data."""
    table = pa.concat_tables([make_table(3), make_table(4)])
    assert table["chosen_input_ids"].num_chunks == 2
    data = PairDataset(table)
    for row, chunk in ((0, 0), (2, 0), (3, 1), (6, 1)):
        held = table["chosen_input_ids"].chunk(chunk).values.to_numpy()
        assert np.shares_memory(data.ids(row, "chosen"), held)


@pytest.mark.parametrize(
    ("row", "side"),
    [(([5], [], [6]), "chosen"), (([5], [6], []), "rejected"), (([], [5], [6]), "chosen")],
    ids=["no chosen response", "no rejected response", "no prompt"],
)
def test_a_row_without_response_token_is_refused_by_name(
    make_table: MakeTable, row: tuple[list[int], ...], side: str
) -> None:
    with pytest.raises(OrpoError, match=rf"row 1 \(id pair-1\): {side} has no response token"):
        PairDataset(make_table([([1], [2], [3]), row]))


def test_neighbours_with_one_prompt_are_numbered_alike(make_table: MakeTable) -> None:
    assert PairDataset(make_table(SHARED)).prompt_number.tolist() == [0, 0, 0, 1, 2, 3]


# --- global batches --------------------------------------------------------------------------------------------------


@given(pairs=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_an_epoch_visits_each_pair_once(make_table: MakeTable, pairs: int, size: int, seed: int, epoch: int) -> None:
    order = BatchOrder(PairDataset(make_table(pairs)), size, seed)
    steps = batches_per_epoch(pairs, size)
    batches = [order.batch(epoch * steps + step) for step in range(steps)]
    assert sorted(chain(*batches)) == list(range(pairs))
    assert all(len(batch) == min(size, pairs) for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= size


@given(steps=st.lists(st.integers(0, 40), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_a_batch_depends_on_nothing_that_ran_before(make_table: MakeTable, steps: list[int], seed: int) -> None:
    data = PairDataset(make_table(30))
    used = BatchOrder(data, 7, seed)
    for step in steps:
        assert used.batch(step).tolist() == BatchOrder(data, 7, seed).batch(step).tolist()


def test_epochs_and_seeds_differ_in_order(make_table: MakeTable) -> None:
    data = PairDataset(make_table(50))
    orders = [BatchOrder(data, 50, seed).batch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(st.integers(0, 200))
def test_pairs_of_one_prompt_stay_together_and_in_order(make_table: MakeTable, seed: int) -> None:
    order = BatchOrder(PairDataset(make_table(SHARED)), len(SHARED), seed).batch(seed).tolist()
    place = order.index(0)
    assert order[place : place + 3] == [0, 1, 2]


# --- trees -----------------------------------------------------------------------------------------------------------


def test_a_tree_holds_each_response_once(make_table: MakeTable) -> None:
    """Three pairs of the answers [1], [2] and [3, 3]: two tokens of prompt and four of answers go through the model."""
    data = PairDataset(make_table(SHARED))
    assert tree_of(data, [0, 1, 2], ANSWERS) == Tree(
        pairs=(0, 1, 2),
        responses=((0, "chosen"), (0, "rejected"), (1, "rejected")),
        chosen=(0, 0, 2),
        rejected=(1, 2, 1),
        tokens=2 + 1 + 1 + 2,
    )


def test_chosen_alone_leaves_the_rejected_out(make_table: MakeTable) -> None:
    tree = tree_of(PairDataset(make_table(SHARED)), [0, 1, 2], ANSWERS[:1])
    assert (tree.responses, tree.rejected, tree.tokens) == (((0, "chosen"), (2, "chosen")), (), 2 + 1 + 2)


def test_trees_grow_over_neighbours_as_far_as_the_limits_allow(make_table: MakeTable) -> None:
    data = PairDataset(make_table(SHARED))

    def grown(**limits: int) -> list[tuple[int, ...]]:
        return [tree.pairs for tree in grow_trees(data, range(6), ANSWERS, Limits(**limits))]

    assert grown(tokens=100) == [(0, 1, 2), (3,), (4,), (5,)]
    assert grown(tokens=6) == [(0, 1, 2), (3,), (4,), (5,)]
    assert grown(tokens=5) == [(pair,) for pair in range(6)]
    assert grown(tokens=100, pairs=2) == [(0, 1), (2,), (3,), (4,), (5,)]
    assert grown(tokens=100, pairs=1) == [(pair,) for pair in range(6)]


# --- forward passes --------------------------------------------------------------------------------------------------


def _trees(data: PairDataset, batch: Any, limits: Limits) -> list[Tree]:
    return grow_trees(data, batch, ANSWERS, limits)


@given(
    pairs=st.integers(1, 40),
    tokens=st.integers(36, 200),
    most=st.one_of(st.none(), st.integers(1, 9)),
    world=st.integers(1, 5),
    packed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_micro_batches_of_all_ranks_part_the_batch(
    make_table: MakeTable, pairs: int, tokens: int, most: int | None, world: int, packed: bool, seed: int
) -> None:
    data = PairDataset(make_table(60, seed=seed))
    batch = np.random.default_rng(seed).choice(60, pairs, replace=False)
    limits = Limits(max(tokens, 2 * data.longest), most)
    passes = micro_batches(data, batch, ANSWERS, limits, packed=packed, multiple=world)
    assert len(passes) % world == 0, "a rank that runs short would leave the others waiting"
    seen = Counter(pair for micro in passes if micro.weight for tree in micro.trees for pair in tree.pairs)
    assert seen == Counter(batch.tolist())
    assert {micro.weight for micro in passes} <= {0.0, 1.0}
    for micro in passes:
        held = [pair for tree in micro.trees for pair in tree.pairs]
        longest = max(data.lengths[side][pair] for side in ANSWERS for pair in held)
        needed = sum(tree.tokens for tree in micro.trees) if packed else 2 * len(held) * longest
        assert limits.hold(needed, len(held))


def test_packing_fills_evenly(make_table: MakeTable) -> None:
    """Trees of 6, 5, 4 and 3 tokens under a budget of 11: 9 and 9, where first-fit would make 11 and 7."""
    shapes = enumerate([(3, 2), (2, 2), (1, 2), (1, 1)])
    data = PairDataset(make_table([([10 + i], [2] * n, [3] * m) for i, (n, m) in shapes]))
    trees = _trees(data, range(4), Limits(100))
    assert [tree.tokens for tree in trees] == [6, 5, 4, 3]
    assert [[tree.tokens for tree in micro.trees] for micro in pack(trees, Limits(11))] == [[6, 3], [5, 4]]


def test_fewer_trees_than_processes_let_the_others_stand_in(make_table: MakeTable) -> None:
    data = PairDataset(make_table(SHARED))
    passes = pack(_trees(data, [3], Limits(100)), Limits(100), multiple=3)
    assert [micro.weight for micro in passes] == [1.0, 0.0, 0.0]
    assert all(micro.trees == passes[0].trees for micro in passes)


def test_a_tree_beyond_the_limits_is_no_endless_search(make_table: MakeTable) -> None:
    data = PairDataset(make_table(SHARED))
    with pytest.raises(ValueError, match="larger than a forward pass"):
        pack(_trees(data, [3], Limits(100)), Limits(3))


def test_padded_rows_count_their_padding(make_table: MakeTable) -> None:
    """Sequences of 2 and 9 tokens: together they would be four rows of 9, which 20 tokens do not hold."""
    data = PairDataset(make_table([([1], [2], [3]), ([1], [2] * 8, [3])]))
    trees = [tree_of(data, [pair], ANSWERS) for pair in (1, 0)]
    assert [[tree.pairs for tree in micro.trees] for micro in cut(data, trees, Limits(20))] == [[(0,)], [(1,)]]
    assert [[tree.pairs for tree in micro.trees] for micro in cut(data, trees, Limits(36))] == [[(0,), (1,)]]


@pytest.mark.parametrize(("packed", "needed"), [(True, 2 + 5 + 3), (False, 2 * (2 + 5))])
def test_a_pair_beyond_the_budget_is_named_before_training(make_table: MakeTable, packed: bool, needed: int) -> None:
    data = PairDataset(make_table([([1], [2], [3]), ([1, 1], [2] * 5, [3] * 3)]))
    check_limits(data, ANSWERS, needed, packed=packed)
    with pytest.raises(OrpoError, match=rf"row 1 \(id pair-1\): the pair takes {needed} tokens.*micro_batch_tokens"):
        check_limits(data, ANSWERS, needed - 1, packed=packed)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 120))
def test_padded_batches_hold_each_sequence_once_within_the_budget(lengths: list[int], tokens: int) -> None:
    batches = by_length(lengths, tokens)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    sizes = [[lengths[place] for place in batch] for batch in batches]
    assert [length for batch in sizes for length in batch] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or batch[0] * len(batch) <= tokens for batch in sizes)
    assert all(batch[0] * (len(batch) + 1) > tokens for batch in sizes[:-1])
