"""Records out of JSON text: lines, one record each, or one array."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from isal import igzip, isal_zlib  # gzip, three times as fast

from orpo_data.ragged import offsets

CompressionError: Any = isal_zlib.error  # its stub takes the class for an instance

NOT_UTF8 = "not UTF-8: "
"""Begins the record of a line that is no text, so that it can never pass for JSON."""

TOO_LONG = "longer than the limit: "
"""Begins the record of a line that was not read whole; it can never pass for JSON either."""

NO_JSON = "not to be written as JSON: "
"""Begins the record of a table's row that holds what Python has no value for; it can never pass for JSON either."""

BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 20  # bytes of lines that are cut at a time
MOST_FIELDS = 64  # of an object that is read as columns, each of which takes memory for every row
ROWS = 1_000  # records of an array, or of a table, that are written as text at a time


@dataclass(frozen=True)
class Limits:
    """Most bytes, as they are when decompressed, that are read in one piece: a small file may unfold to terabytes."""

    record: int = 1 << 26  # of a line or of a table's row; at least CHUNK
    array: int = 1 << 32  # of a JSON array that is a file, of a parquet row group, of an Arrow record batch


LIMITS = Limits()


def json_records(path: Path, compressed: bool, whole: bool, limits: Limits = LIMITS) -> Iterator[pa.Table]:
    """`source_row` and `record` of JSON lines or, where the file is one `whole` JSON value, of an array's elements.

    Raises:
        OSError, EOFError, ValueError, RecursionError, CompressionError: the file is broken, compressed or as JSON.
    """
    with igzip.IGzipFile(path) if compressed else path.open("rb") as data:
        row = 0
        while not (head := _line(data, limits.array if whole else limits.record)).removeprefix(BOM).strip():
            if not head:
                return
            row += 1
        head = head.removeprefix(BOM)
        if whole and head.lstrip().startswith((b"[", TOO_LONG.encode())):
            yield from _numbered(_array(_whole(data, head, limits.array)))
            return
        if whole:
            try:
                orjson.loads(head)
            except orjson.JSONDecodeError:  # an object over several lines, for example
                raise ValueError("neither an array nor JSON lines") from None
        while head or (head := _line(data, limits.record)):
            lines = _lines(head + _lines_of(data.read(CHUNK), data, limits.record))
            yield record_table(lines, row)
            row += len(lines) - 1  # what stands behind the last line break is the next one, or nothing
            head = b""


def _line(data: Any, limit: int, begun: bytes = b"") -> bytes:
    """The line that has `begun`, to its end; of one that is longer than the limit no more than its beginning."""
    line: bytes = begun + data.readline(max(limit - len(begun), 0) + 1)
    if len(line) <= limit or line.endswith(b"\n"):
        return line
    while (more := data.readline(CHUNK)) and not more.endswith(b"\n"):
        pass
    return f"{TOO_LONG}{limit:,} bytes\n".encode()


def _lines_of(chunk: bytes, data: Any, limit: int) -> bytes:
    """Whole lines: those of a chunk, and the rest of its last one."""
    if not chunk or chunk.endswith(b"\n"):
        return chunk
    end = chunk.rfind(b"\n") + 1
    return b"".join((memoryview(chunk)[:end], _line(data, limit, chunk[end:])))  # copied once


def _whole(data: Any, head: bytes, limit: int) -> bytes:
    content: bytes = head + data.read(max(limit - len(head), 0) + 1)
    if len(content) > limit or head.startswith(TOO_LONG.encode()):
        raise ValueError(f"more than {limit:,} bytes in one JSON array; make it JSON lines, or raise max_array_bytes")
    return content


def _lines(content: bytes) -> pa.Array:
    """The lines of `content` without white space around them, as texts."""
    ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
    bounds = np.concatenate(([0], ends, [len(content)]))
    lines = pa.LargeStringArray.from_buffers(len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(content))
    try:
        lines.validate(full=True)
    except pa.ArrowInvalid:  # not UTF-8
        return pa.array([_decoded(line.strip()) for line in content.split(b"\n")], pa.string())
    return pc.ascii_trim_whitespace(lines)


def _array(content: bytes) -> Iterator[str]:
    """The elements of a JSON array. The standard reader lets pass what JSON forbids (NaN, half a surrogate pair) and
    writes it out again as it was, so that it costs its row and not the file."""
    values: list[Any] = json.loads(content)
    encode = json.JSONEncoder(ensure_ascii=False).encode
    for value in values:
        yield encode(value).encode(errors="backslashreplace").decode()


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return NOT_UTF8 + line.decode(errors="backslashreplace")


def _numbered(records: Iterator[str]) -> Iterator[pa.Table]:
    first = 0
    while texts := list(islice(records, ROWS)):
        yield record_table(pa.array(texts, pa.string()), first)
        first += len(texts)


def record_table(records: pa.Array, first: int) -> pa.Table:
    """`source_row` and `record` of one row after the other, from row `first` on; blank ones are left out."""
    rows = pa.array(np.arange(first, first + len(records)), pa.int32())
    table = pa.table({"source_row": rows, "record": records.cast(pa.string())})
    blank = pc.equal(records, "")
    return table.filter(pc.invert(blank)) if pc.any(blank).as_py() else table


def read_alike(records: pa.StringArray, kind: pa.StructType) -> pa.StructArray | None:
    """JSON objects that are of one type, as columns; None if one record is anything else, or has a field more.

    No object for a record or a value, and other threads run meanwhile. Arrow reads one value after the other, wherever
    it ends. Where every record begins with a brace and ends with one, no value goes on in the next record: a string
    would hold the line break between them, and outside of strings no JSON has "}" before "{". So as many values as
    there are records are one for each.
    """
    lines = pc.binary_join_element_wise(records, "", "\n")
    bounds, data = offsets(lines), np.frombuffer(lines.buffers()[2] or b"", np.uint8)
    first, last = bounds[:-1], bounds[1:] - 2
    if not ((last > first).all() and (data[first] == ord("{")).all() and (data[last] == ord("}")).all()):
        return None
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(data),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            pyarrow.json.ParseOptions(explicit_schema=pa.schema(kind), unexpected_field_behavior="error"),
        )
    except pa.ArrowInvalid:
        return None
    values = table.to_struct_array().combine_chunks()
    return values if len(values) == len(records) and _is_finite(values) else None


def type_of(values: Iterable[Any]) -> pa.DataType:
    """The type that all of these JSON values have, nulls aside: numbers are float64.

    Raises ValueError if they have none, or one of objects that have more fields than is sensible.
    """
    known = [value for value in values if value is not None]
    kinds = {*map(type, known)}
    if kinds == {dict}:
        names = dict.fromkeys(chain.from_iterable(known))
        if len(names) > MOST_FIELDS:
            raise ValueError(f"objects with {len(names)} fields")
        return pa.struct({name: type_of(value.get(name) for value in known) for name in names})
    if kinds == {list}:
        items = type_of(chain.from_iterable(known))
        return pa.list_(pa.string() if items == pa.null() else items)  # Arrow miscounts what lists of nulls hold
    if kinds <= {int, float}:
        return pa.float64() if kinds else pa.null()
    if len(kinds) > 1:
        raise ValueError(f"values of {len(kinds)} types")
    return pa.string() if kinds == {str} else pa.bool_()


def _is_finite(values: pa.Array) -> bool:
    """Whether no number in them, at any depth, is one that JSON does not have: Arrow reads NaN and Infinity."""
    if pa.types.is_struct(values.type):
        return all(map(_is_finite, values.flatten()))
    if pa.types.is_list(values.type):
        return _is_finite(values.flatten())
    return not pa.types.is_floating(values.type) or pc.all(pc.is_finite(values), min_count=0).as_py()
