"""Dataset folders: bytes that depend on the rows alone, opened everywhere, complete or absent."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import orpo_data
from orpo_data import shards
from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Input, read_manifest
from orpo_data.schema import MESSAGES, TOKENIZED
from orpo_data.shards import DatasetWriter, ShardWriter, file_sha256, read_table
from orpo_data.stage import Branch, run_stage
from orpo_data.steps.step import Step, StepOutput, divide

ROOT = Path(__file__).parents[2]

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("messages", MESSAGES),
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("score", pa.float32()),
        pa.field("flag", pa.bool_()),
    ]
)
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


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 rows, shards of 8."""
    monkeypatch.setattr(shards, "ROWS_PER_BATCH", 4)
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 8)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_shards(folder: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> dict[str, bytes]:
    writer = ShardWriter(folder, schema)
    for table in tables:
        writer.write(table)
    writer.close()
    return contents(folder)


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
    opened = pa.concat_tables(shards.open_shard(p) for p in sorted((folder / "whole").glob("*.arrow")))
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


@pytest.mark.parametrize(("rows", "expected"), [(0, [0]), (1, [1]), (7, [7]), (8, [8]), (9, [8, 1]), (17, [8, 8, 1])])
def test_shard_boundaries(small_shards: None, tmp_path: Path, rows: int, expected: list[int]) -> None:
    writer = ShardWriter(tmp_path, pa.schema([pa.field("n", pa.int32())]))
    for n in range(rows):
        writer.write(pa.table({"n": pa.array([n], pa.int32())}))
    named = writer.close()
    assert [name for name, _, _ in named] == [
        f"data-{i:05d}-of-{len(expected):05d}.arrow" for i in range(len(expected))
    ]
    assert [count for _, count, _ in named] == expected
    assert {p.name for p in tmp_path.iterdir()} == {"state.json", "dataset_info.json", *(name for name, _, _ in named)}
    tables = [shards.open_shard(tmp_path / name) for name, _, _ in named]
    assert pa.concat_tables(tables)["n"].to_pylist() == list(range(rows))
    assert all(len(b) == 4 for table in tables for b in table.to_batches()[:-1])
    assert datasets.load_from_disk(str(tmp_path)).num_rows == rows


def test_tokens_are_counted_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 2]},
        {"chosen_input_ids": [1], "rejected_input_ids": []},
    ]
    writer = ShardWriter(tmp_path, TOKENIZED)
    writer.write(pa.Table.from_pylist(rows, schema=TOKENIZED))
    assert writer.close() == [("data-00000-of-00001.arrow", 2, 6)]


# --- a stage that names some rows bad, to write folders with ---------------------------------------------------------


class Odd(Step):
    """Drops the rows whose score is even."""

    name = "odd"
    version = 1

    def apply(self, table: pa.Table) -> StepOutput:
        reasons = ["even" if score % 2 == 0 else None for score in table["score_chosen"].to_pylist()]
        kept, dropped = divide("odd", table, pa.array(reasons, pa.string()), pa.nulls(len(table), pa.string()))
        return StepOutput(kept, dropped)


@pytest.fixture
def write(make_pairs: Callable[..., pa.Table], make_pair: Callable[..., Any]) -> Callable[..., Any]:
    """Writes numbered pairs as a dataset folder; `fail_after` rows the source breaks off."""

    def run(output: Path, rows: int = 21, version: str = "1", fail_after: int | None = None, **config: Any) -> Any:
        table = make_pairs([make_pair(f"Question {i}?", score_chosen=i, source_row=i) for i in range(rows)])

        def read(batch_rows: int) -> Iterator[tuple[None, pa.Table]]:
            for start in range(0, rows, batch_rows):
                if fail_after is not None and start >= fail_after:
                    raise OrpoError("the source broke off")
                yield None, table.slice(start, batch_rows)

        branch = Branch([Input(name="numbers", fingerprint=version)], read, [Odd()], "test")
        return run_stage("clean", output, table.schema, [branch], batch_rows=5, **config)

    return run


FOLDER = {
    *("README.md", "_lineage.ndjson", "_manifest.json", "report.html"),
    *("data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "dataset_info.json", "state.json"),
    *("dropped/data-00000-of-00002.arrow", "dropped/data-00001-of-00002.arrow"),
    *("dropped/dataset_info.json", "dropped/state.json"),
}


def test_the_files_of_a_folder_and_nothing_beside_it(
    small_shards: None, tmp_path: Path, write: Callable[..., Any]
) -> None:
    report = write(tmp_path / "clean")
    assert (report.rows_in, report.rows_out, report.dropped) == (21, 10, {"even": 11})
    assert contents(tmp_path / "clean").keys() == FOLDER
    assert [p.name for p in tmp_path.iterdir()] == ["clean"]


SPLIT_FOLDER = {"README.md", "_lineage.ndjson", "_manifest.json", "report.html", "dataset_dict.json"} | {
    f"{part}/{name}"
    for part in ("train", "eval", "dropped")
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
}


@pytest.mark.parametrize("stage", ["split", "tokenize"])
def test_the_files_of_a_split_folder(prepared: Path, stage: str) -> None:
    assert contents(prepared / stage).keys() == SPLIT_FOLDER


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean"])
def test_a_whole_dataset_opens_everywhere_with_the_same_rows(prepared: Path, stage: str) -> None:
    folder = prepared / stage
    rows = read_table(folder).to_pylist()
    assert len(rows) == read_manifest(folder).rows > 0
    assert datasets.load_from_disk(str(folder)).to_list() == rows
    assert orpo_data.load(folder).to_list() == rows
    assert orpo_data.scan(folder).collect().to_dicts() == rows
    assert (
        orpo_data.load(str(folder), split="dropped").to_list()
        == datasets.load_from_disk(str(folder / "dropped")).to_list()
    )
    assert orpo_data.scan(folder, split="dropped").collect().to_dicts() == orpo_data.load(folder, "dropped").to_list()


@pytest.mark.parametrize("stage", ["split", "tokenize"])
def test_a_split_dataset_opens_everywhere_with_the_same_rows(prepared: Path, stage: str) -> None:
    folder = prepared / stage
    opened = datasets.load_from_disk(str(folder))
    assert list(opened) == ["train", "eval"]
    for split in opened:
        rows = read_table(folder, split).to_pylist()
        assert len(rows) > 0
        assert opened[split].to_list() == orpo_data.load(folder, split).to_list() == rows
        assert orpo_data.scan(folder, split).collect().to_dicts() == rows
    assert orpo_data.scan(folder).collect().height == sum(len(opened[split]) for split in opened)


def test_several_shards_open_as_one(small_shards: None, tmp_path: Path, write: Callable[..., Any]) -> None:
    write(tmp_path / "clean")
    expected = [i for i in range(21) if i % 2]
    assert orpo_data.load(tmp_path / "clean")["source_row"][:] == expected
    assert datasets.load_from_disk(str(tmp_path / "clean"))["source_row"][:] == expected
    assert orpo_data.scan(tmp_path / "clean").collect()["source_row"].to_list() == expected
    assert orpo_data.load(tmp_path / "clean", "dropped")["source_row"][:] == [i for i in range(21) if i % 2 == 0]


def test_rows_are_mapped_not_read(prepared: Path) -> None:
    before = pa.total_allocated_bytes()
    table = read_table(prepared / "clean")
    assert table.nbytes > 10_000
    assert pa.total_allocated_bytes() - before < 1_000


@pytest.mark.parametrize("opener", [orpo_data.load, orpo_data.scan])
def test_an_unknown_split(prepared: Path, opener: Callable[..., Any]) -> None:
    with pytest.raises(OrpoError, match=r"^no split 'test' in this split dataset, it has \['train', 'eval'\]$"):
        opener(prepared / "split", "test")
    with pytest.raises(OrpoError, match=r"^no split 'eval' in this clean dataset, it has \['train'\]$"):
        opener(prepared / "clean", "eval")


def test_what_is_no_dataset_folder(tmp_path: Path) -> None:
    with pytest.raises(OrpoError, match="not a dataset folder"):
        orpo_data.load(tmp_path)
    with pytest.raises(OrpoError, match="not a dataset folder"):
        orpo_data.scan(tmp_path / "absent")


# --- complete or absent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["notes.txt", "sub/notes.txt"])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, write: Callable[..., Any], held: str) -> None:
    (tmp_path / "out" / held).parent.mkdir(parents=True)
    (tmp_path / "out" / held).write_text("mine")
    with pytest.raises(OrpoError, match=r"out: holds something else"):
        write(tmp_path / "out")
    assert contents(tmp_path) == {f"out/{held}": b"mine"}


def test_a_file_in_the_way_is_left_alone(tmp_path: Path, write: Callable[..., Any]) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OrpoError, match=r"out: is a file"):
        write(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"mine"}


def test_another_tools_manifest_does_not_make_a_folder_ours(tmp_path: Path, write: Callable[..., Any]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST_NAME).write_text('{"files": ["thesis.tex"]}')
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(OrpoError, match=r"out: "):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_files_put_into_our_folder_are_not_deleted(tmp_path: Path, write: Callable[..., Any]) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(OrpoError, match=r"thesis\.tex"):
        write(tmp_path / "out", version="2")
    assert contents(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path: Path, write: Callable[..., Any]) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert orpo_data.verify(tmp_path / "out").ok


def test_a_failure_midway_leaves_nothing(tmp_path: Path, write: Callable[..., Any]) -> None:
    with pytest.raises(OrpoError, match="broke off"):
        write(tmp_path / "out", fail_after=10)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_midway_leaves_the_old_folder(tmp_path: Path, write: Callable[..., Any]) -> None:
    write(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(OrpoError, match="broke off"):
        write(tmp_path / "out", version="2", fail_after=10)
    assert contents(tmp_path) == before


def test_a_failure_while_moving_leaves_the_old_folder(
    tmp_path: Path, write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses the second of the two renames."""
    write(tmp_path / "out")
    before, rename = contents(tmp_path), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError("no")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="no"):
            write(tmp_path / "out", version="2")
    assert contents(tmp_path) == before


def test_a_run_killed_while_moving_does_not_cost_the_old_folder(tmp_path: Path, write: Callable[..., Any]) -> None:
    """Between the two renames it lies aside; the next run, though it fails, puts it back first."""
    write(tmp_path / "out")
    before = contents(tmp_path)
    (tmp_path / "out").rename(tmp_path / ".out.stale")
    with pytest.raises(OrpoError, match="broke off"):
        write(tmp_path / "out", version="2", fail_after=10)
    assert contents(tmp_path) == before


def test_leaving_the_writer_without_commit_leaves_nothing(tmp_path: Path, make_pairs: Callable[..., pa.Table]) -> None:
    with DatasetWriter(tmp_path / "out", make_pairs(3).schema) as writer:
        writer.write(make_pairs(3))
        writer.close()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from itertools import pairwise
from pathlib import Path
from orpo_data import events, manifest, report, shards, stage

point, count, raw, tokenizer, output = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
calls = 0

def dying(function):
    def wrapped(*args, **kwargs):
        global calls
        if function.__name__ == "rename" and "part-" in str(args[0]):
            return function(*args, **kwargs)
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

where = {"write": (shards.ShardWriter, "_write_batch"), "close": (shards.ShardWriter, "close"),
         "pages": (stage, "write_pages"), "manifest": (shards, "write_manifest"), "rename": (Path, "rename"),
         "remove": (shards, "remove_folder")}
if point in where:
    holder, name = where[point]
    setattr(holder, name, dying(getattr(holder, name)))

from pipelines import Recipe
from pipelines.stages import ingest
recipe = Recipe.parse({"name": "test", "sources": [{"dataset": "hh-rlhf", "path": raw}],
                       "tokenize": {"tokenizer": tokenizer}})
ingest(recipe.sources[0], recipe, Path(output), batch_rows=7)
"""

# rename: 1 moves the old folder away, 2 the new one in; remove: 4 is that of the old one
INSTANTS = [
    ("write", 1),
    ("close", 1),
    ("close", 2),
    ("pages", 1),
    ("manifest", 1),
    ("rename", 1),
    ("rename", 2),
    ("remove", 4),
]


def test_killed_at_any_instant_the_next_run_ends_in_the_same_bytes(
    tmp_path: Path, raw_data: Path, make_recipe: Callable[..., Any], prepared: Path
) -> None:
    """Over an older output, so that there is something to lose: each child dies by SIGKILL where the case says."""
    from pipelines.stages import ingest

    recipe = make_recipe("sources.0.path=" + str(raw_data / "hh"))
    children = {}
    for point, count in INSTANTS:
        output = tmp_path / f"{point}-{count}" / "out"
        older = make_recipe('sources.0.columns={"chosen": "rejected"}')
        ingest(older.sources[0], older, output)
        command = [sys.executable, "-c", KILLED, point, str(count), str(raw_data / "hh"), "none", str(output)]
        children[output] = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if len(children) % 2 == 0:
            children[output].wait(60)
    for output, child in children.items():
        assert child.wait(60) == -signal.SIGKILL, output
        for folder in output.parent.iterdir():  # what lies there now is a whole dataset or no dataset
            assert orpo_data.verify(folder).ok or not (folder / MANIFEST_NAME).exists() or folder.name.startswith(".")
        assert not output.exists() or orpo_data.verify(output).ok
        ingest(recipe.sources[0], recipe, output)
        assert [p.name for p in output.parent.iterdir()] == ["out"]
        assert orpo_data.verify(output).ok
        assert read_manifest(output).content_hash == read_manifest(prepared / "ingest/hh-rlhf").content_hash
        for shard in read_manifest(output).shards:
            assert file_sha256(output / shard.path) == file_sha256(prepared / "ingest/hh-rlhf" / shard.path)
