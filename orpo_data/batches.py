"""How many rows are worked on at a time.

Larger batches leave Python, which one core at a time can run, a smaller share of the work; smaller ones keep all cores
busy to the end, stay nearer to the processor, and several of them have to fit into memory.
"""

from collections.abc import Iterable, Iterator

import pyarrow as pa

BATCH_ROWS = 4_000
BATCH_BYTES = 1 << 25  # about; every core holds one or two batches, and several forms of each


def batches_of(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    """The rows of `table` in tables of at most so many rows, and of about BATCH_BYTES at most."""
    rows = max(1, min(rows, BATCH_BYTES * len(table) // max(1, table.nbytes)))
    return (table.slice(start, rows) for start in range(0, len(table), rows))


def regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same of the rows of small tables, each as soon as it is there."""
    waiting, count, size = list[pa.Table](), 0, 0
    for table in tables:
        waiting.append(table)
        count, size = count + len(table), size + table.nbytes
        if count >= rows or size >= BATCH_BYTES:
            whole = pa.concat_tables(waiting)
            end = count if size >= BATCH_BYTES else count - count % rows
            yield from batches_of(whole.slice(0, end), rows)
            waiting, count, size = [whole.slice(end)], count - end, whole.slice(end).nbytes
    if count:
        yield pa.concat_tables(waiting)
