"""Dataset folders, written: bytes that depend on the rows alone, complete or absent."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data import writing
from orpo_data.places import file_sha256
from orpo_data.schema import MESSAGES, TOKENIZED
from orpo_data.shards import open_shard
from orpo_data.writing import DatasetWriter, ShardWriter, WrittenShard

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("messages", MESSAGES),
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("score", pa.float32()),
        pa.field("flag", pa.bool_()),
    ]
)
NUMBER = pa.schema([pa.field("n", pa.int32())])
message = st.fixed_dictionaries({"role": st.sampled_from(["user", None]), "content": st.none() | st.text(max_size=5)})
row = st.fixed_dictionaries(
    {
        "id": st.none() | st.text(max_size=4),
        "messages": st.none() | st.lists(st.none() | message, max_size=3),
        "ids": st.none() | st.lists(st.none() | st.integers(0, 9), max_size=4),
        "score": st.none() | st.floats(width=32, allow_nan=False),
        "flag": st.none() | st.booleans(),
    }
)


def write_shards(folder: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> list[bytes]:
    """The bytes of each shard."""
    writer = ShardWriter(folder / "rows", schema)
    for table in tables:
        writer.write(table)
    return [shard.file.read_bytes() for shard in writer.close(at_least=1)]


def cut(rows: list[Any], cuts: list[int], how: str) -> Iterator[pa.Table]:
    """The same rows in other tables: built apart, sliced from one, with other types, or out of other rows."""
    whole = pa.Table.from_pylist(rows, schema=SCHEMA)
    edges = [0, *sorted(min(c, len(rows)) for c in cuts), len(rows)]
    for start, stop in pairwise(edges):
        part = whole.slice(start, stop - start)
        if how == "built":
            yield pa.Table.from_pylist(rows[start:stop], schema=SCHEMA)
        elif how == "filtered":
            doubled = pa.concat_tables([part, part]).combine_chunks()
            yield doubled.filter(pa.array([True] * len(part) + [False] * len(part), pa.bool_()))
        elif how == "polars":
            frame = pl.from_arrow(part)
            assert isinstance(frame, pl.DataFrame)
            yield frame.to_arrow().select(SCHEMA.names[::-1])  # large_string and columns the other way round
        else:
            yield part


@given(
    st.lists(row, max_size=19),
    st.lists(st.integers(0, 19), max_size=5),
    st.sampled_from(["built", "filtered", "polars", "sliced"]),
)
def test_bytes_depend_on_the_rows_alone(
    small_shards: None, tmp_path_factory: pytest.TempPathFactory, rows: list[Any], cuts: list[int], how: str
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    whole = write_shards(folder / "whole", SCHEMA, iter([pa.Table.from_pylist(rows, schema=SCHEMA)]))
    assert write_shards(folder / "parts", SCHEMA, cut(rows, cuts, how)) == whole
    opened = pa.concat_tables(open_shard(p) for p in sorted((folder / "whole").iterdir()))
    assert opened.to_pylist() == rows
    assert opened.schema == SCHEMA


def test_what_lies_under_a_null_does_not_reach_the_file(tmp_path: Path) -> None:
    """The same nulls over other buffers, as a mask leaves them."""
    mask = pa.py_buffer(bytes([0b101]))
    scores = [pa.py_buffer(pa.array([1, under, 3], pa.float32()).buffers()[1]) for under in (2, 9)]
    tables = [
        pa.table({"score": pa.Array.from_buffers(pa.float32(), 3, [mask, values])}).append_column(
            "id", pa.array(list("abc"))
        )
        for values in scores
    ]
    schema = pa.schema([pa.field("id", pa.string()), pa.field("score", pa.float32())])
    first, second = (write_shards(tmp_path / str(i), schema, iter([table])) for i, table in enumerate(tables))
    assert first == second


def test_what_lies_under_a_null_in_a_message_does_not_either(tmp_path: Path) -> None:
    mask, offsets = pa.py_buffer(bytes([0b01])), pa.array([0, 1, 2], pa.int32()).buffers()[1]
    contents = [pa.StringArray.from_buffers(2, offsets, pa.py_buffer(texts), mask) for texts in (b"ab", b"ax")]
    roles = pa.array(["user", "assistant"])
    talks = [
        pa.ListArray.from_arrays([0, 2], pa.StructArray.from_arrays([roles, c], ["role", "content"])) for c in contents
    ]
    assert talks[0].equals(talks[1])
    schema = pa.schema([pa.field("prompt", MESSAGES)])
    first, second = (
        write_shards(tmp_path / str(i), schema, iter([pa.table({"prompt": talk})])) for i, talk in enumerate(talks)
    )
    assert first == second


@pytest.mark.parametrize(("rows", "expected"), [(0, []), (1, [1]), (7, [7]), (8, [8]), (9, [8, 1]), (17, [8, 8, 1])])
def test_shard_boundaries(small_shards: None, tmp_path: Path, rows: int, expected: list[int]) -> None:
    writer = ShardWriter(tmp_path / "new" / "rows", NUMBER)
    for n in range(rows):
        writer.write(pa.table({"n": pa.array([n], pa.int32())}))
    written = writer.close()
    assert [shard.file for shard in written] == [tmp_path / "new" / f"rows-{i:05d}" for i in range(len(expected))]
    assert [shard.rows for shard in written] == expected
    tables = [open_shard(shard.file) for shard in written]
    assert [n for table in tables for n in table["n"].to_pylist()] == list(range(rows))
    assert all(len(b) == 4 for table in tables for b in table.to_batches()[:-1])
    for shard in written:
        size, sha256 = shard.file.stat().st_size, file_sha256(shard.file)
        assert (shard.tokens, shard.bytes, shard.sha256) == (None, size, sha256)


def test_texts_too_large_for_one_batch_are_cut_by_the_rows_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(writing, "MOST_BYTES_PER_BATCH", 100)
    texts = ["a" * size for size in (10, 20, 90, 5, 300, 7, 8)]
    table = pa.table({"text": texts})
    (one,) = write_shards(tmp_path / "one", table.schema, iter([table]))
    (other,) = write_shards(tmp_path / "other", table.schema, iter([table.slice(0, 3), table.slice(3)]))
    assert one == other
    read = open_shard(tmp_path / "one" / "rows-00000")
    assert read["text"].to_pylist() == texts
    assert all(batch.nbytes <= 100 or len(batch) == 1 for batch in read.to_batches())


def test_tokens_are_counted_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 2]},
        {"chosen_input_ids": [1], "rejected_input_ids": []},
    ]
    writer = ShardWriter(tmp_path / "rows", TOKENIZED)
    writer.write(pa.Table.from_pylist(rows, schema=TOKENIZED))
    (shard,) = writer.close()
    assert (shard.rows, shard.tokens) == (2, 6)
    (empty,) = ShardWriter(tmp_path / "empty", TOKENIZED).close(at_least=1)
    assert (empty.rows, empty.tokens, open_shard(empty.file).schema) == (0, 0, TOKENIZED)


# --- folders ----------------------------------------------------------------------------------------------------------


def numbers(*values: int) -> pa.Table:
    return pa.table({"n": pa.array(values, pa.int32())}, schema=NUMBER)


def finished(prefix: Path, *values: int) -> WrittenShard:
    writer = ShardWriter(prefix, NUMBER)
    writer.write(numbers(*values))
    (shard,) = writer.close()
    return shard


def test_shards_take_their_places_in_the_order_they_came(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "out", NUMBER) as writer:
        one, two, three = (finished(writer.work / name, i, i) for i, name in enumerate("abc"))
        writer.adopt(two)
        writer.adopt(three)
        writer.adopt(one)
        shards, dropped = writer.close()
        names = [f"data-0000{i}-of-00003.arrow" for i in range(3)]
        assert [shard.path for shard in shards] == names
        assert [writer.placed[shard.file] for shard in (two, three, one)] == names
        assert datasets.load_from_disk(str(writer.folder))["n"][:] == [1, 1, 2, 2, 0, 0]
        assert [(shard.path, shard.rows) for shard in dropped] == [("dropped/data-00000-of-00001.arrow", 0)]
        assert not writer.work.exists()


def test_splits_stand_in_the_order_they_were_declared(tmp_path: Path) -> None:
    """One to which no row went is there as well."""
    with DatasetWriter(tmp_path / "out", NUMBER) as writer:
        writer.declare_splits(["train", "eval"])
        writer.write(numbers(5), "test")
        writer.adopt(finished(writer.work / "a", 1, 2), "eval")
        shards, _ = writer.close()
        assert [(shard.path, shard.split, shard.rows) for shard in shards] == [
            (f"{split}/data-00000-of-00001.arrow", split, rows)
            for split, rows in [("train", 0), ("eval", 2), ("test", 1)]
        ]
        opened = datasets.load_from_disk(str(writer.folder))
        assert {split: opened[split]["n"][:] for split in opened} == {"train": [], "eval": [1, 2], "test": [5]}


def test_a_dataset_without_a_row_has_an_empty_shard(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "out", NUMBER) as writer:
        (shard,), _ = writer.close()
        assert (shard.path, shard.rows) == ("data-00000-of-00001.arrow", 0)
        assert datasets.load_from_disk(str(writer.folder)).num_rows == 0


def test_leaving_the_writer_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "out", NUMBER) as writer:
        writer.write(numbers(1, 2))
        writer.close()
    assert list(tmp_path.iterdir()) == []
