"""Records out of tables: the rows of parquet and Arrow files as JSON text."""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orpo_data.sources.columns import Ints
from orpo_data.sources.json_text import LIMITS, NO_JSON, ROWS, TOO_LONG, Limits, record_table
from orpo_data.sources.unfolding import FILE_BEGIN, Page, arrow_sizes, parquet_pages, row_groups

STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def table_records(path: Path, parquet: bool, limits: Limits = LIMITS) -> Iterator[pa.Table]:
    """`source_row` and `record` of every row; of a row whose values are too long only that they are.

    Raises:
        OSError, EOFError, ValueError, ArrowException: the file is broken, or unfolds to more than the limit.
    """
    first = 0
    for batch in _parquet_batches(path, limits.array) if parquet else _arrow_batches(path, limits.array):
        batch.validate(full=True)
        sizes = row_bytes(batch.to_struct_array())
        for start, stop in _pieces(sizes, limits.record):
            if sizes[start] > limits.record:
                records = pa.array([f"{TOO_LONG}{limits.record:,} bytes"])
            else:
                rows = _written_out(batch, start, stop)
                records = _json_columns(rows) if _is_plain(pa.struct(rows.schema)) else _json_rows(rows)
            yield record_table(records, first + start)
        first += len(batch)


# --- how much a small file can hold -----------------------------------------------------------------------------------


def row_bytes(column: pa.Array) -> Ints:
    """How long the values of each row are when they are written out, 8 bytes for what is no text.

    A value that stands in many rows is measured once, wherever Arrow has it once. Raises ValueError for types whose
    rows may share parts in other ways.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _numbers(pa.array(row_bytes(column.dictionary)).take(column.indices))
    if pa.types.is_struct(kind):
        return sum(map(row_bytes, column.flatten()), np.zeros(len(column), np.int64))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        ends = np.concatenate(([0], np.cumsum(row_bytes(column.values) + 8)))
        sizes: Ints = np.diff(ends[column.offsets.to_numpy()])
        return sizes
    if pa.types.is_fixed_size_list(kind):
        return row_bytes(column.cast(pa.list_(kind.value_type)))
    if pa.types.is_nested(kind):
        raise ValueError(f"a column of the type {kind} is not read")
    if any(check(kind) for check in TEXTS):
        return _numbers(pc.binary_length(column))
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # 16 bytes each, the length first
        lengths = np.frombuffer(column.buffers()[1], np.int32)[::4][column.offset :][: len(column)]
        return np.where(column.is_valid(), lengths, 0)
    return np.full(len(column), 8)


def _numbers(lengths: pa.Array) -> Ints:
    known: Ints = lengths.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return known


def _pieces(sizes: Ints, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are written as text together; one that is over the limit stands alone."""
    ends, start = np.cumsum(sizes), 0
    while start < len(sizes):
        most = ends[start] - sizes[start] + limit
        stop = min(max(int(np.searchsorted(ends, most, side="right")), start + 1), start + ROWS)
        yield start, min(stop, len(sizes))
        start = stop


def _written_out(batch: pa.RecordBatch, start: int, stop: int) -> pa.RecordBatch:
    """Some rows, with each value in its place."""
    plain = pa.schema([field.with_type(_plain(field.type)) for field in batch.schema])
    if plain == batch.schema:
        return batch.slice(start, stop - start)
    return batch.take(pa.array(range(start, stop))).cast(plain)  # of a slice also the rest might be written out


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of a column without dictionaries."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _parquet_batches(path: Path, limit: int) -> Iterator[pa.RecordBatch]:
    """Texts come as dictionaries where Arrow can: as the file has them, each once, however many rows refer to it."""
    metadata, data = pq.read_metadata(path), memoryview(pa.memory_map(str(path)).read_buffer()).cast("B")
    groups = row_groups(data)
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    for number, group in enumerate(groups):
        pages = [list(parquet_pages(data, chunk)) for chunk in group.columns]
        kept = [
            _is_text(column) and all(page.into_dictionary for page in own)
            for column, own in zip(columns, pages, strict=True)
        ]
        size = sum(map(_unfolded, pages, columns, kept), 8 * group.rows)
        if size > limit:
            raise ValueError(
                f"row group {number} may unfold to {size:,} bytes, more than {limit:,}; write smaller row groups, or "
                "raise max_array_bytes"
            )
        texts = [column.path for column, is_kept in zip(columns, kept, strict=True) if is_kept]
        yield from pq.ParquetFile(path, metadata=metadata, read_dictionary=texts).iter_batches(row_groups=[number])


def _is_text(column: pq.ColumnSchema) -> bool:
    return column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "JSON", "NONE")


def _unfolded(pages: Sequence[Page], column: pq.ColumnSchema, as_dictionary: bool) -> int:
    """Most bytes of a column of a row group in memory, with its texts as a dictionary or written out."""
    size, values = sum(page.unfolded for page in pages), sum(page.values for page in pages)
    if not as_dictionary and column.physical_type == "BYTE_ARRAY" and any(_repeats(page) for page in pages):
        return size * values
    return size + int(max(8, column.length or 0)) * values


def _repeats(page: Page) -> bool:
    """Whether what stands in it once may be the text, or the beginning, of many values: a dictionary's has none."""
    return page.deltas or not page.values


# --- as JSON ---------------------------------------------------------------------------------------------------------


def _json_rows(rows: pa.RecordBatch) -> pa.Array:
    """Each row as JSON; what JSON has no form for (bytes, decimals, dates) as what it means."""
    try:
        texts = [orjson.dumps(row, default=_json_form).decode() for row in rows.to_pylist()]
    except (OverflowError, ValueError, TypeError) as error:  # a date beyond the year 9999: it costs its row
        if len(rows) == 1:
            return pa.array([f"{NO_JSON}{error.__cause__ or error}"])
        return pa.concat_arrays([_json_rows(rows.slice(row, 1)) for row in range(len(rows))])
    return pa.array(texts, pa.string())


def _json_form(value: Any) -> str | float:
    """Some writers do not say that their bytes are text."""
    if isinstance(value, bytes):
        return value.decode()
    return float(value) if isinstance(value, Decimal) else str(value)


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
        if "\0" in "".join(names):  # polars panics
            return False
        return 0 < len(names) == len({*names}) and all(_is_plain(field.type) for field in kind)
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_float64,
        pa.types.is_boolean,
    )
    return any(check(kind) for check in checks)


def _arrow_batches(path: Path, limit: int) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as data:
        for number, size in enumerate(arrow_sizes(memoryview(data.read_buffer()).cast("B"))):
            if size > limit:
                raise ValueError(
                    f"record batch {number} unfolds to {size:,} bytes, more than {limit:,}; write smaller ones, or "
                    "raise max_array_bytes"
                )
        data.seek(0)
        if data.read(len(FILE_BEGIN)) == FILE_BEGIN:
            reader = pa.ipc.open_file(data)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            data.seek(0)
            yield from pa.ipc.open_stream(data)
            if data.read_at(8, data.size() - 8) != STREAM_END:
                raise EOFError("no end of stream: the file was cut short")
