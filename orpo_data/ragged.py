"""Columns of token ids taken for columns of bytes, four an id: so Arrow joins, cuts and compares them in bulk.

Buffers are looked at where they lie: each call into Arrow gives the interpreter's lock away and waits for it again.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orpo_data.schema import TOKEN_IDS

Counts = npt.NDArray[np.int64]
Offsets = npt.NDArray[np.int32]

_WIDTH = 4  # bytes of an int32
_MOST = np.iinfo(np.int32).max


def offsets(column: pa.ListArray | pa.StringArray | pa.BinaryArray) -> Offsets:
    """Where each of n rows begins, and where the last one ends: n + 1 places in the column's values or bytes."""
    if not len(column):  # there may be no buffer
        return np.zeros(1, np.int32)
    return np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]


def as_bytes(lists: pa.ListArray) -> pa.BinaryArray:
    """The rows of a list<int32>, without a copy of the ids; no row and no id may be null."""
    return cut(lists.values, offsets(lists))


def as_lists(rows: pa.BinaryArray) -> pa.ListArray:
    """The reverse of `as_bytes`."""
    return _lists(rows, offsets(rows))


def cut(ids: pa.Int32Array, bounds: Counts | Offsets) -> pa.BinaryArray:
    """As bytes, with a row from each of the bounds to the next; no id may be null."""
    if (size := int(bounds[-1]) * _WIDTH) > _MOST:
        raise pa.ArrowInvalid(f"{size} not in range: a column of bytes holds {_MOST} at most")
    starts = bounds.astype(np.int32, copy=False) * np.int32(_WIDTH)
    data = ids.buffers()[1].slice(ids.offset * _WIDTH) if len(ids) else pa.py_buffer(b"")
    return pa.Array.from_buffers(pa.binary(), len(starts) - 1, [None, pa.py_buffer(starts), data])


def merge(rows: pa.BinaryArray, bounds: Counts) -> pa.ListArray:
    """As lists, each of all rows from one of the bounds to the next; the first bound is 0, the last is their number."""
    return _lists(rows, offsets(rows)[bounds])


def _lists(rows: pa.BinaryArray, bounds: Offsets) -> pa.ListArray:
    """As lists, each of all bytes from one of the bounds to the next."""
    ends = bounds // np.int32(_WIDTH)
    ids = pa.Array.from_buffers(pa.int32(), int(ends[-1]), [None, rows.buffers()[2]])
    return pa.ListArray.from_buffers(TOKEN_IDS, len(ends) - 1, [None, pa.py_buffer(ends)], children=[ids])


def keep(lists: pa.ListArray, mask: pa.BooleanArray) -> pa.ListArray:
    """The rows for which the mask is true."""
    return as_lists(as_bytes(lists).filter(mask))


def join(*columns: pa.ListArray | list[int]) -> pa.ListArray:
    """Row by row, the ids of each column behind those of the one before; a list of ids stands in every row."""
    whole = [as_bytes(c) if isinstance(c, pa.Array) else pa.scalar(np.array(c, np.int32).tobytes()) for c in columns]
    return as_lists(pc.binary_join_element_wise(*whole, b""))


def split(lists: pa.ListArray, counts: Counts) -> tuple[pa.ListArray, pa.ListArray]:
    """The first `counts` ids of each row, and the others."""
    ends = offsets(lists)
    pieces = cut(lists.values, np.append(np.column_stack([ends[:-1], ends[:-1] + counts]), ends[-1]))
    first = np.arange(0, len(pieces), 2)
    return as_lists(pieces.take(pa.array(first))), as_lists(pieces.take(pa.array(first + 1)))


def lengths(lists: pa.ListArray) -> Counts:
    counts: Counts = np.diff(offsets(lists)).astype(np.int64)
    return counts


def ranges(starts: Counts, lengths: Counts) -> Counts:
    """The numbers of [start, start + length) for each pair, one after the other: ranges([7, 0], [2, 3]) = 7 8 0 1 2."""
    before = np.cumsum(lengths) - lengths
    index: Counts = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
    return index
