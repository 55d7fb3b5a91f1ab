"""Token ids as bytes: Arrow's joins and cuts against Python's."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.ragged import as_bytes, as_lists, cut, join, keep, lengths, merge, offsets, ranges, split
from orpo_data.schema import TOKEN_IDS

rows = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4), max_size=6)


@st.composite
def columns(draw: st.DrawFn) -> pa.ListArray:
    """A list<int32> that may be part of a longer one, of ids that may be part of others."""
    before, own, behind = draw(rows), draw(rows), draw(rows)
    whole, unused = pa.array([*before, *own, *behind], TOKEN_IDS), pa.array([7] * draw(st.integers(0, 2)), pa.int32())
    values = pa.concat_arrays([unused, whole.values]).slice(len(unused))
    return pa.ListArray.from_arrays(whole.offsets, values).slice(len(before), len(own))


@given(st.lists(st.text(max_size=3)), st.integers(0, 3), st.sampled_from([pa.string(), pa.binary(), TOKEN_IDS]))
def test_offsets(texts: list[str], before: int, kind: pa.DataType) -> None:
    """Those of a column that begins in the middle of another, and of one without a row, which may have no buffer."""
    values = [text.encode() for text in texts]
    column = pa.array([b"abc"] * before + values, pa.binary() if kind != TOKEN_IDS else TOKEN_IDS).cast(kind)
    own = column.slice(before)
    assert np.diff(offsets(own)).tolist() == [len(value) for value in values]
    assert offsets(own)[0] == 3 * before * bool(values)
    assert offsets(own.filter(pa.array([False] * len(own), pa.bool_()))).tolist() == [0]


@given(columns())
def test_there_and_back(lists: pa.ListArray) -> None:
    assert as_lists(as_bytes(lists)).equals(lists)
    assert as_lists(as_bytes(lists)).type == TOKEN_IDS
    assert as_lists(as_bytes(lists).slice(1)).equals(lists.slice(1))
    assert lengths(lists).tolist() == [len(ids) for ids in lists.to_pylist()]


@given(columns(), st.lists(st.integers(0, 9), max_size=2), st.data())
def test_join(lists: pa.ListArray, same: list[int], data: st.DataObject) -> None:
    others = data.draw(st.permutations(lists.to_pylist()))
    joined = join(same, lists, pa.array(others, TOKEN_IDS), same)
    assert joined.to_pylist() == [[*same, *a, *b, *same] for a, b in zip(lists.to_pylist(), others, strict=True)]


@given(columns(), st.data())
def test_split(lists: pa.ListArray, data: st.DataObject) -> None:
    counts = np.array([data.draw(st.integers(0, count)) for count in lengths(lists)], np.int64)
    first, others = split(lists, counts)
    assert first.to_pylist() == [ids[:n] for ids, n in zip(lists.to_pylist(), counts, strict=True)]
    assert others.to_pylist() == [ids[n:] for ids, n in zip(lists.to_pylist(), counts, strict=True)]


@given(columns(), st.data())
def test_cut(lists: pa.ListArray, data: st.DataObject) -> None:
    ids = lists.flatten()
    bounds = np.array([0, *sorted(data.draw(st.lists(st.integers(0, len(ids))))), len(ids)])
    whole = [ids.slice(start, end - start).to_pylist() for start, end in pairwise(bounds)]
    assert cut(ids, bounds).to_pylist() == [np.array(part, np.int32).tobytes() for part in whole]


@given(columns(), st.data())
def test_merge(lists: pa.ListArray, data: st.DataObject) -> None:
    rows = lists.to_pylist()
    bounds = np.array([0, *sorted(data.draw(st.lists(st.integers(0, len(rows))))), len(rows)])
    merged = [[code for row in rows[start:end] for code in row] for start, end in pairwise(bounds)]
    assert merge(as_bytes(lists), bounds).to_pylist() == merged


@given(columns(), st.data())
def test_keep(lists: pa.ListArray, data: st.DataObject) -> None:
    mask = [data.draw(st.booleans()) for _ in range(len(lists))]
    assert keep(lists, pa.array(mask, pa.bool_())).equals(lists.filter(pa.array(mask, pa.bool_())))


def test_more_than_arrow_can_count_is_an_error() -> None:
    """Never offsets that have come round to the beginning."""
    untouched = pa.Array.from_buffers(pa.int32(), 2**29, [None, pa.py_buffer(np.zeros(2**29, np.int32))])  # no memory
    with pytest.raises(pa.ArrowInvalid, match="2147483648 not in range"):
        as_bytes(pa.ListArray.from_arrays(pa.array([0, 2**29], pa.int32()), untouched))


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5))))
def test_ranges(pairs: list[tuple[int, int]]) -> None:
    starts, counts = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    assert ranges(starts, counts).tolist() == [n for start, count in pairs for n in range(start, start + count)]
