"""Which pairs make a batch, and how they lie in memory."""

from collections import Counter
from collections.abc import Callable
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.errors import OrpoError
from orpo_train.batching import PairDataset, batches_per_epoch, collate, global_batch, micro_batches

MakeTable = Callable[..., pa.Table]


def test_collate_as_its_docstring_says(make_table: MakeTable) -> None:
    batch = collate(PairDataset(make_table([([7, 8], [3, 2], [5])])), [0])
    assert batch.input_ids.tolist() == [[7, 8, 3, 2], [7, 8, 5, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.positions.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [3, 2, 5]
    assert batch.sequence.tolist() == [0, 0, 1]
    assert batch.in_response.tolist() == [True, True, True]
    assert batch.pairs == 1


def test_scope_with_prompt_reads_the_prompt_of_the_chosen_rows_only(make_table: MakeTable) -> None:
    batch = collate(PairDataset(make_table([([7, 8], [3, 2], [5])])), [0], "prompt+response")
    assert batch.positions.tolist() == [0, 1, 2, 5]
    assert batch.targets.tolist() == [8, 3, 2, 5]
    assert batch.in_response.tolist() == [False, True, True, True]


def test_chosen_rows_come_first(make_table: MakeTable) -> None:
    batch = collate(PairDataset(make_table([([1], [2], [3]), ([4], [5], [6])])), [1, 0])
    assert batch.input_ids.tolist() == [[4, 5], [1, 2], [4, 6], [1, 3]]


@given(st.integers(0, 2**32), st.sampled_from(["response", "prompt+response"]))
def test_masks_follow_from_prompt_len_never_from_token_values(make_table: MakeTable, seed: int, scope: str) -> None:
    """The same shape of batch whether responses are made of random tokens or of nothing but zeros and ends."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 6, (4, 3))

    def table(tokens: list[int]) -> pa.Table:
        draw = [[random.choice(tokens, n).tolist() for n in row] for row in lengths]
        return make_table([tuple(row) for row in draw])

    ordinary, special = (collate(PairDataset(table(tokens)), range(4), scope) for tokens in ([9, 10, 11], [0, 1, 2]))
    for name in ("attention_mask", "positions", "sequence", "in_response"):
        assert torch.equal(getattr(ordinary, name), getattr(special, name))
    assert ordinary.attention_mask.sum() == 2 * lengths[:, 0].sum() + lengths[:, 1:].sum()
    assert ordinary.in_response.sum() == lengths[:, 1:].sum()
    flat = special.input_ids.flatten()
    assert torch.equal(flat[special.positions + 1], special.targets)


def test_nll_tokens_count_what_collate_reads(make_table: MakeTable) -> None:
    data = PairDataset(make_table(9))
    pairs = np.array([2, 5, 7])
    for scope in ("response", "prompt+response"):
        batch = collate(data, pairs, scope)
        assert data.nll_tokens(pairs, scope) == int((batch.sequence < batch.pairs).sum())


def test_dataset_figures(make_table: MakeTable) -> None:
    data = PairDataset(make_table([([7, 8], [3, 2], [5]), ([1], [2], [599])]))
    assert (len(data), data.tokens, data.longest, data.largest_id) == (2, 4 + 3 + 2 + 2, 4, 599)
    assert data.ids(1, "rejected").tolist() == [1, 599]


def test_a_part_of_a_table_and_several_chunks_read_the_same_rows(make_table: MakeTable) -> None:
    whole = PairDataset(make_table(8))
    pieces = pa.concat_tables([make_table(8).slice(2, 3), make_table(8).slice(5, 2)])
    for table in (make_table(8).slice(2, 5), pieces):
        part = PairDataset(table)
        assert [part.ids(i, "chosen").tolist() for i in range(5)] == [
            whole.ids(i, "chosen").tolist() for i in range(2, 7)
        ]
        assert part.tokens == sum(whole.lengths[side][2:7].sum() for side in ("chosen", "rejected"))
        assert torch.equal(collate(part, [0, 4]).input_ids, collate(whole, [2, 6]).input_ids)


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


@given(pairs=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_an_epoch_visits_each_pair_once(pairs: int, size: int, seed: int, epoch: int) -> None:
    steps = batches_per_epoch(pairs, size)
    batches = [global_batch(pairs, size, seed, epoch * steps + step) for step in range(steps)]
    assert sorted(chain(*batches)) == list(range(pairs))
    assert all(len(batch) == min(size, pairs) for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= size
    again = global_batch(pairs, size, seed, epoch * steps)
    assert again.tolist() == batches[0].tolist()


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = [global_batch(50, 50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(pairs=st.integers(1, 40), size=st.integers(1, 9), world=st.integers(1, 5), seed=st.integers(0, 100))
def test_micro_batches_of_all_ranks_part_the_batch(pairs: int, size: int, world: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 50, 100)
    batch = random.choice(100, pairs, replace=False)
    ranks = [micro_batches(batch, lengths, size, rank, world) for rank in range(world)]
    assert len({len(micros) for micros in ranks}) == 1, "a rank that runs short would leave the others waiting"
    seen = Counter(int(pair) for micro in chain(*ranks) if micro.weight for pair in micro.pairs)
    assert seen == Counter(batch.tolist())
    assert {micro.weight for micro in chain(*ranks)} <= {0.0, 1.0}
    for micros in ranks:
        assert all(1 <= len(micro.pairs) <= size for micro in micros)
        own = [lengths[pair] for micro in micros if micro.weight for pair in micro.pairs]
        assert own == sorted(own), "pairs of like length together"


def test_micro_batches_as_their_docstring_says() -> None:
    micros = micro_batches(np.array([4, 0, 2]), np.array([9, 0, 3, 0, 5]), size=2)
    assert [micro.pairs.tolist() for micro in micros] == [[2, 4], [0]]


def test_tokens_are_read_where_they_lie(make_table: MakeTable) -> None:
    """Several record batches, as every shard has them: rows are views, so memory does not grow with the data."""
    table = pa.concat_tables([make_table(3), make_table(4)])
    assert table["chosen_input_ids"].num_chunks == 2
    data = PairDataset(table)
    for row, chunk in ((0, 0), (2, 0), (3, 1), (6, 1)):
        held = table["chosen_input_ids"].chunk(chunk).values.to_numpy()
        assert np.shares_memory(data.ids(row, "chosen"), held)
