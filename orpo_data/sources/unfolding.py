"""How much a table's file unfolds to, read off its own headers before anything is unfolded.

A decompressor stops at the size that a header states, so these sizes bind. The footer of a parquet file repeats them,
but nothing compares it with the pages; so the pages are asked. Footer and headers are structs of Thrift's compact
protocol; pyarrow has what stands in the footer too, but some broken ones end the process there.
An Arrow file states the size of a compressed buffer in the buffer's first eight bytes; where buffers lie stands in
tables of FlatBuffers. Both notations are read here as far as that takes, and no further.
"""

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

# --- parquet: https://github.com/apache/parquet-format, src/main/thrift/parquet.thrift --------------------------------

Wanted = Mapping[int, "Wanted"]
"""Fields of a struct by number, each with those that are wanted of the structs in it."""

_CHUNK: Wanted = {7: {}, 9: {}, 11: {}}  # its size, and where its data pages and its dictionary begin
_FOOTER: Wanted = {4: {1: {3: _CHUNK}, 3: {}}}  # row groups, their columns and rows
_PAGE: Wanted = {2: {}, 3: {}, 5: {1: {}, 2: {}}, 8: {1: {}, 4: {}}}  # sizes; headers of data pages: values, encoding
_DEEPEST = 32  # structs and lists in each other; parquet's own go eight deep
_DELTA_LENGTH_BYTE_ARRAY, _DELTA_BYTE_ARRAY = 6, 7


class Chunk(NamedTuple):
    """Where the pages of a column of a row group lie."""

    start: int
    size: int


class RowGroup(NamedTuple):
    rows: int
    columns: list[Chunk]


class Page(NamedTuple):
    """What the header of a page states."""

    unfolded: int  # bytes
    values: int  # with nulls; 0 of a dictionary's page
    encoding: int | None  # of its values, by number

    @property
    def deltas(self) -> bool:
        """Whether each of its texts may repeat all of those before it."""
        return self.encoding == _DELTA_BYTE_ARRAY

    @property
    def into_dictionary(self) -> bool:
        """Whether Arrow can read its texts as a dictionary."""
        return self.encoding not in (_DELTA_LENGTH_BYTE_ARRAY, _DELTA_BYTE_ARRAY)


def row_groups(data: memoryview) -> list[RowGroup]:
    """What the footer of a parquet file says; ValueError if it is broken."""
    with _naming("the footer"):
        end = len(data) - 8
        footer = _Compact(data, end - _number("<I", data, end)).struct(_FOOTER)
        groups = footer.get(4, ())
        found = [RowGroup(_count(group[3]), [_chunk(column[3]) for column in group[1]]) for group in groups]
        if sum(chunk.size for group in found for chunk in group.columns) > len(data):
            raise ValueError("columns share pages")  # each would be looked at again for all of them
        return found


def _chunk(fields: Mapping[int, Any]) -> Chunk:
    size, start, dictionary = (_count(fields.get(number, 0)) for number in _CHUNK)
    return Chunk(min(filter(None, (start, dictionary)), default=0), size)  # without rows there is no data page


def parquet_pages(data: memoryview, chunk: Chunk) -> Iterator[Page]:
    """The pages of a column of a row group; ValueError if a header is broken."""
    place = chunk.start
    while place < chunk.start + chunk.size:
        with _naming(f"the page header at byte {place:,}"):
            header = _Compact(data, place)
            fields = header.struct(_PAGE)
            unfolded, packed = (_count(fields.get(number)) for number in (2, 3))
            first, second = fields.get(5, {}), fields.get(8, {})  # of a data page, of the first or second version
            values, encoding = _count((first or second).get(1, 0)), first.get(2, second.get(4))
        yield Page(unfolded, values, encoding)
        place = header.place + packed


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("no number")
    return value


class _Compact:
    """Thrift's compact protocol (https://github.com/apache/thrift, doc/specs), read from a place on."""

    def __init__(self, data: memoryview, place: int) -> None:
        self.data = data
        self.place = place

    def struct(self, wanted: Wanted, deepest: int = _DEEPEST) -> dict[int, Any]:
        """The wanted fields: integers, structs, and lists of these; of everything else only that it is there."""
        found, number = dict[int, Any](), 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            value = self._value(head & 15, wanted.get(number, {}), deepest)
            if number in wanted:
                found[number] = value
        return found

    def _value(self, kind: int, wanted: Wanted, deepest: int) -> Any:
        if kind in (1, 2):  # true, false
            return None
        if kind in (4, 5, 6):
            return self._integer()
        if kind in (3, 7, 8):  # a byte, a double, a text
            size = {3: 1, 7: 8}[kind] if kind != 8 else self._unsigned()
            self.place += size
            return None
        if kind in (9, 10) and deepest:  # a list, a set
            head, found = self._byte(), list[Any]()
            for _ in range(head >> 4 if head >> 4 < 15 else self._unsigned()):
                value = self._value(3 if head & 15 in (1, 2) else head & 15, wanted, deepest - 1)
                if wanted:
                    found.append(value)
            return found
        if kind == 12 and deepest:
            return self.struct(wanted, deepest - 1)
        raise ValueError("a value of no known type")

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number without end")

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)


# --- Arrow: https://github.com/apache/arrow, format/Message.fbs and File.fbs ------------------------------------------

FILE_BEGIN = b"ARROW1"
_DICTIONARY, _BATCH = 2, 3  # what a message holds
_EARLY_COMPRESSION = b"ARROW:experimental_compression"  # in the messages of Arrow 0.17


def arrow_sizes(data: memoryview) -> Iterator[int]:
    """Bytes that each record batch unfolds to, with the dictionaries so far, which stay.

    What is compressed, and 8 for each value: of some types they take no room in the file.
    Of a stream or a file; ValueError if what it says of itself is broken.
    """
    dictionaries = described = 0
    with _naming("the file's table of contents"):
        blocks = _blocks(data) if data[: len(FILE_BEGIN)] == FILE_BEGIN else _messages(data)
        for start, body in blocks:
            message = _Table(data, start + _number("<I", data, start))
            kind, header = message.value(1, "<B"), message.table(2)
            if kind == _DICTIONARY and header:
                header = header.table(1)
            if kind not in (_DICTIONARY, _BATCH) or not header:
                continue
            nodes = header.structs(1, 16)
            described += 16 * (len(nodes) + len(header.structs(2, 16)))
            if described > len(data):
                raise ValueError("batches share their descriptions")  # each would be looked at for all of them
            size = 8 * sum(_count(_number("<q", data, place)) for place in nodes)
            size += 8 * _count(header.value(0, "<q"))
            if header.table(3) or _EARLY_COMPRESSION in bytes(data[start:body]):
                size += sum(_unfolded_buffers(header, data, body))
            if kind == _DICTIONARY:
                dictionaries += size
            else:
                yield dictionaries + size


def _unfolded_buffers(batch: "_Table", data: memoryview, body: int) -> Iterator[int]:
    for place in batch.structs(2, 16):
        offset, length = (_number("<q", data, place + at) for at in (0, 8))
        size = _number("<q", data, body + offset) if length else -1
        if size != -1:  # or it is not compressed
            yield _count(size)


def _messages(data: memoryview) -> Iterator[tuple[int, int]]:
    """Where the FlatBuffers and the bodies of a stream's messages begin."""
    place = 0
    while place + 4 <= len(data):
        start, size = _prefix(data, place)
        if not size:
            return
        yield start, start + size
        place = start + size + _count(_Table(data, start + _number("<I", data, start)).value(3, "<q"))


def _blocks(data: memoryview) -> Iterator[tuple[int, int]]:
    """The same of a file's, dictionaries first, as its footer has them."""
    end = len(data) - len(FILE_BEGIN) - 4
    start = end - _number("<i", data, end)
    footer = _Table(data, start + _number("<I", data, start))
    for place in chain(footer.structs(2, 24), footer.structs(3, 24)):
        block = _number("<q", data, place)
        yield _prefix(data, block)[0], block + _number("<i", data, place + 8)


def _prefix(data: memoryview, place: int) -> tuple[int, int]:
    """Where the FlatBuffers of the message at `place` begin, and their length."""
    size = _number("<i", data, place)
    if size == -1:  # since Arrow 0.15
        place, size = place + 4, _number("<i", data, place + 4)
    return place + 4, _count(size)


class _Table:
    """A table of FlatBuffers."""

    def __init__(self, data: memoryview, place: int) -> None:
        self._data = data
        self._place = place
        self._offsets = place - _number("<i", data, place)
        self._fields = (_number("<H", data, self._offsets) - 4) // 2

    def _find(self, number: int) -> int | None:
        """Where the field lies; None if it has its default."""
        offset = _number("<H", self._data, self._offsets + 4 + 2 * number) if number < self._fields else 0
        return self._place + offset if offset else None

    def value(self, number: int, form: str) -> int:
        place = self._find(number)
        return 0 if place is None else _number(form, self._data, place)

    def table(self, number: int) -> "_Table | None":
        place = self._find(number)
        return None if place is None else _Table(self._data, place + _number("<I", self._data, place))

    def structs(self, number: int, size: int) -> range:
        """The places of a vector's structs of `size` bytes."""
        place = self._find(number)
        if place is None:
            return range(0)
        start = place + _number("<I", self._data, place)
        return range(start + 4, start + 4 + size * _number("<I", self._data, start), size)


def _number(form: str, data: memoryview, place: int) -> int:
    if place < 0:
        raise ValueError("before the beginning")
    value: int = struct.unpack_from(form, data, place)[0]
    return value


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, OverflowError, struct.error) as error:
        raise ValueError(f"{what} is broken") from error
