"""Arrow stream files mapped into memory, and out of it again while a long run goes on."""

import mmap
from pathlib import Path
from threading import Lock
from weakref import WeakSet

import pyarrow as pa

_MAPS: WeakSet[mmap.mmap] = WeakSet()
"""The files that tables of this process still lie in."""

_CHANGING = Lock()
"""Held while that set grows or is gone through: a thread may read while another runs a stage."""


def map_stream(file: Path) -> pa.Table:
    """The table in a stream file, without a copy. Raises OSError or ValueError if it cannot be read."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with _CHANGING:
        _MAPS.add(mapped)
    table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
    mapped.madvise(mmap.MADV_DONTNEED)  # the headers of all batches, and what the system read around each
    return table


def let_go() -> None:
    """Take what was read of mapped files out of this process' memory; what is needed again is mapped again.

    Otherwise all of a dataset stays resident that was looked at once, as long as its table lives.
    """
    with _CHANGING:
        maps = list(_MAPS)
    for mapped in maps:
        mapped.madvise(mmap.MADV_DONTNEED)
