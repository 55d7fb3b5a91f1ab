"""Columns of token ids taken for columns of bytes, four an id: so Arrow joins, cuts and compares them in bulk."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Counts = npt.NDArray[np.int64]

_WIDTH = 4  # bytes of an int32


def as_bytes(lists: pa.ListArray) -> pa.BinaryArray:
    """The rows of a list<int32>, without a copy of the ids; no row and no id may be null."""
    return _binary(lists, lists.offsets.to_numpy())


def as_lists(rows: pa.BinaryArray) -> pa.ListArray:
    """The reverse of `as_bytes`."""
    return merge(rows, np.arange(len(rows) + 1))


def merge(rows: pa.BinaryArray, bounds: Counts) -> pa.ListArray:
    """As lists, each of all rows from one of the bounds to the next; the first bound is 0, the last is their number."""
    _, offsets, data = rows.buffers()
    ends = np.frombuffer(offsets, np.int32)[rows.offset + bounds] // _WIDTH
    ids = pa.Array.from_buffers(pa.int32(), int(ends[-1]), [None, data])
    return pa.ListArray.from_arrays(pa.array(ends), ids)


def keep(lists: pa.ListArray, mask: pa.BooleanArray) -> pa.ListArray:
    """The rows for which the mask is true."""
    return as_lists(as_bytes(lists).filter(mask))


def join(*columns: pa.ListArray | list[int]) -> pa.ListArray:
    """Row by row, the ids of each column behind those of the one before; a list of ids stands in every row."""
    whole = [as_bytes(c) if isinstance(c, pa.Array) else pa.scalar(np.array(c, np.int32).tobytes()) for c in columns]
    return as_lists(pc.binary_join_element_wise(*whole, b""))


def split(lists: pa.ListArray, counts: Counts) -> tuple[pa.ListArray, pa.ListArray]:
    """The first `counts` ids of each row, and the others."""
    offsets = lists.offsets.to_numpy()
    pieces = _binary(lists, np.append(np.column_stack([offsets[:-1], offsets[:-1] + counts]), offsets[-1]))
    first = np.arange(0, len(pieces), 2)
    return as_lists(pieces.take(pa.array(first))), as_lists(pieces.take(pa.array(first + 1)))


def lengths(lists: pa.ListArray) -> Counts:
    counts: Counts = np.diff(lists.offsets.to_numpy()).astype(np.int64)
    return counts


def ranges(starts: Counts, lengths: Counts) -> Counts:
    """The numbers of [start, start + length) for each pair, one after the other: ranges([7, 0], [2, 3]) = 7 8 0 1 2."""
    before = np.cumsum(lengths) - lengths
    index: Counts = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
    return index


def _binary(lists: pa.ListArray, bounds: Counts) -> pa.BinaryArray:
    """The ids of `lists` as bytes, with a row from each of the bounds to the next."""
    ids = lists.values
    starts = pa.array(bounds.astype(np.int64) * _WIDTH, pa.int32())  # ArrowInvalid beyond 2 GB
    data = ids.buffers()[1].slice(ids.offset * _WIDTH) if len(ids) else pa.py_buffer(b"")
    return pa.Array.from_buffers(pa.binary(), len(bounds) - 1, [None, starts.buffers()[1], data])
