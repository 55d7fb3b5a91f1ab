import json
import struct
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.sources import unfolding
from orpo_data.sources.files import RawFile, read_records
from orpo_data.sources.json_text import CHUNK, Limits
from orpo_data.sources.unfolding import Chunk, arrow_sizes, parquet_pages, row_groups

TEXTS = ["a" * 900, "b", None, "c" * 70] * 300
TABLE = pa.table(
    {
        "text": pa.array(TEXTS),
        "number": pa.array(range(len(TEXTS)), pa.int64()),
        "turns": pa.array([[{"role": "user", "content": text}] for text in TEXTS]),
    }
)


def chunks(path: Path):
    metadata, data = pq.read_metadata(path), memoryview(path.read_bytes())
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            place = row_groups(data)[group].columns[column]
            assert place.size == chunk.total_compressed_size
            yield chunk, list(parquet_pages(data, place))


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_hold_what_the_footer_of_an_honest_file_says(tmp_path, version, compression, dictionary):
    path = tmp_path / "t.parquet"
    options = {"data_page_version": version, "compression": compression, "use_dictionary": dictionary}
    pq.write_table(TABLE, path, row_group_size=500, data_page_size=4_000, write_batch_size=50, **options)
    for chunk, pages in chunks(path):
        headers = chunk.total_uncompressed_size - sum(page.unfolded for page in pages)
        assert 0 < headers < 3_000 * len(pages)  # with the least and the greatest text
        assert sum(page.values for page in pages) == chunk.num_values
        assert not any(page.deltas for page in pages)
    assert max(len(pages) for _, pages in chunks(path)) >= (2 if dictionary else 3)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_texts_that_repeat_those_before_them_are_seen(tmp_path, version):
    encoding = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(TABLE.select(["text"]), tmp_path / "t.parquet", data_page_version=version, **encoding)
    assert all(page.deltas for _, pages in chunks(tmp_path / "t.parquet") for page in pages)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_texts_that_arrow_makes_no_dictionary_of_are_read(tmp_path, encoding):
    table = TABLE.select(["text", "turns"]).slice(0, 40)
    forms = {"text": encoding, "turns.list.element.content": encoding}
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False, column_encoding=forms, row_group_size=30)
    tables = read_records(RawFile("t.parquet", tmp_path / "t.parquet"), "pairs")
    records = [json.loads(record) for rows in tables for record in rows["record"].to_pylist()]
    assert records == table.to_pylist()


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_row_group_without_rows_is_none(tmp_path, dictionary):
    with pq.ParquetWriter(tmp_path / "t.parquet", TABLE.schema, use_dictionary=dictionary) as writer:
        for rows in (0, 2, 0, 3):
            writer.write_table(TABLE.slice(0, rows))
    tables = list(read_records(RawFile("t.parquet", tmp_path / "t.parquet"), "pairs"))
    assert sum(map(len, tables)) == 5


def varint(value: int, length: int) -> bytes:
    """In Thrift's zigzag form, in so many bytes."""
    value <<= 1
    return bytes([value >> 7 * i & 127 | (128 if i < length - 1 else 0) for i in range(length)])


def test_a_footer_that_lies_is_not_believed(tmp_path):
    """Sixteen megabytes in a few kilobytes, of which the footer says that they are 99 bytes."""
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"prompt": ["a" * (16 * CHUNK)]}), path, compression="zstd", use_dictionary=False)
    size, content = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size, path.read_bytes()
    length = next(n for n in range(1, 10) if size << 1 < 1 << 7 * n)
    path.write_bytes(content.replace(varint(size, length), varint(99, length)))
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 99
    with pytest.raises(Exception, match=r"row group 0 may unfold to 16,\d+,\d+ bytes"):
        list(read_records(RawFile(path.name, path), "pairs", limits=Limits(record=2 * CHUNK, array=2 * CHUNK)))


def arrow_file(
    path: Path, compression: str | None, stream: bool, table: pa.Table = TABLE, rows: int | None = 500
) -> memoryview:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return memoryview(path.read_bytes())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_batches_unfold_to_what_they_say(tmp_path, compression, stream):
    sizes = list(arrow_sizes(arrow_file(tmp_path / "t.arrow", compression, stream)))
    batches = TABLE.to_batches(max_chunksize=500)
    places = [8 * len(batch) * 7 for batch in batches]  # of the batch, three columns, a struct and its two fields
    held = [batch.nbytes for batch in batches]
    for size, values, most in zip(sizes, places, held, strict=True):
        assert 0.9 * most < size - values < most + 5_000
    assert list(arrow_sizes(arrow_file(tmp_path / "t.arrow", None, stream))) == places


def test_dictionaries_stay_beside_every_batch(tmp_path):
    table = pa.table({"text": pa.array(["a" * CHUNK, "b"] * 500).dictionary_encode()})
    sizes = list(arrow_sizes(arrow_file(tmp_path / "t.arrow", "zstd", True, table)))
    assert len(sizes) == 2
    assert all(size > CHUNK for size in sizes)


@pytest.mark.parametrize("stream", [True, False])
def test_an_arrow_file_that_unfolds_is_refused(tmp_path, stream):
    path = tmp_path / "bomb.arrow"
    arrow_file(path, "zstd", stream, pa.table({"prompt": ["a" * (16 * CHUNK)]}))
    assert path.stat().st_size < 5_000
    with pytest.raises(Exception, match=r"record batch 0 unfolds to 16,\d+,\d+ bytes.*max_array_bytes"):
        list(read_records(RawFile(path.name, path), "pairs", limits=Limits(record=2 * CHUNK, array=2 * CHUNK)))


@given(st.binary(max_size=300))
@example(b"\x05" * 50)
@example(b"\x80" * 100)  # a number without end
@example(b"\x19\xfc\xff\xff\xff\x7f" + b"\x0c" * 50)  # a list of a billion
@example(b"\x1c" * 100)  # a struct in a struct in a struct
@example(b"\x15\0\x15\2\x15\2\x51\0")  # where the second version's header should be, a truth value
def test_broken_page_headers_are_a_broken_file(content):
    with suppress(ValueError):
        list(parquet_pages(memoryview(content), Chunk(0, len(content))))
    with suppress(ValueError):
        row_groups(memoryview(content + struct.pack("<I", len(content)) + b"PAR1"))


@given(content=st.binary(max_size=100), at=st.integers(0, 2_000), stream=st.booleans())
@example(content=struct.pack("<q", -2), at=0, stream=False)
@example(content=b"\xff" * 8, at=4, stream=True)
def test_broken_arrow_files_are_broken_files(tmp_path_factory, content, at, stream):
    whole = bytearray(arrow_file(tmp_path_factory.mktemp("arrow") / "t.arrow", "zstd", stream, TABLE.slice(0, 10)))
    whole[at : at + len(content)] = content
    with suppress(ValueError):
        list(arrow_sizes(memoryview(bytes(whole))))


def test_values_that_take_no_room_in_the_file_are_refused(tmp_path):
    path = tmp_path / "nulls.arrow"
    arrow_file(path, None, True, pa.table({"prompt": pa.nulls(10_000_000)}), None)
    with pytest.raises(Exception, match=r"record batch 0 unfolds to [\d,]+ bytes"):
        list(read_records(RawFile(path.name, path), "pairs", limits=Limits(record=2 * CHUNK, array=2 * CHUNK)))


def test_batches_that_share_their_description_are_broken(tmp_path, monkeypatch):
    """Else a file of some megabytes would be looked at for hours."""
    data = arrow_file(tmp_path / "t.arrow", None, False)
    blocks = unfolding._blocks
    assert len(list(arrow_sizes(data))) == 3
    monkeypatch.setattr(unfolding, "_blocks", lambda data: list(blocks(data)) * 10_000)
    with pytest.raises(ValueError, match="table of contents is broken"):
        list(arrow_sizes(data))


def test_columns_that_share_pages_are_broken(tmp_path, monkeypatch):
    pq.write_table(TABLE, tmp_path / "t.parquet", row_group_size=500)
    data = memoryview((tmp_path / "t.parquet").read_bytes())
    assert len(row_groups(data)) == 3
    monkeypatch.setattr(unfolding, "_chunk", lambda fields: Chunk(4, len(data) // 2))
    with pytest.raises(ValueError, match="footer is broken"):
        row_groups(data)
