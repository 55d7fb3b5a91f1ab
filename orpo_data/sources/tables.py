"""Records out of tables: the rows of parquet and Arrow files as JSON text."""

from collections.abc import Iterator
from pathlib import Path

import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from orpo_data.sources.json_text import ROWS, record_table

STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def table_records(path: Path, parquet: bool) -> Iterator[pa.Table]:
    """`source_row` and `record` of every row.

    Raises:
        OSError, EOFError, ValueError, ArrowException: the file is broken.
    """
    first = 0
    for batch in pq.ParquetFile(path).iter_batches() if parquet else _arrow_batches(path):
        batch.validate(full=True)
        for start in range(0, len(batch), ROWS):
            rows = batch.slice(start, ROWS)
            yield record_table(_json_columns(rows) if _is_plain(pa.struct(batch.schema)) else _json_rows(rows), first)
            first += len(rows)


def _json_rows(rows: pa.RecordBatch) -> pa.Array:
    """Each row as JSON; what JSON has no form for (bytes, decimals) as its text."""
    return pa.array([orjson.dumps(row, default=str).decode() for row in rows.to_pylist()], pa.string())


def _json_columns(rows: pa.RecordBatch) -> pa.Array:
    """As `_json_rows`, where there is nothing but what JSON has a form for: polars writes it as orjson does."""
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)
    texts = frame.select(pl.struct(pl.all()).struct.json_encode()).to_series()
    return texts.to_arrow(compat_level=pl.CompatLevel.oldest())


def _is_plain(kind: pa.DataType) -> bool:
    """Whether its values are texts, whole numbers, float64, booleans, lists of these and structs of these."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        return 0 < len(names) == len({*names}) and all(_is_plain(field.type) for field in kind)
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_float64,
        pa.types.is_boolean,
    )
    return any(check(kind) for check in checks)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as data:
        if data.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(data)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            data.seek(0)
            yield from pa.ipc.open_stream(data)
            if data.read_at(8, data.size() - 8) != STREAM_END:
                raise EOFError("no end of stream: the file was cut short")
