"""Parts and segments: how a chain of steps is cut, how batches are worked on, what happens when one of them fails."""

import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pyarrow as pa
import pytest

from orpo_data.errors import OrpoError
from orpo_data.manifest import Tally, read_manifest
from orpo_data.parts import PartRun, ShardPart, _in_order, run_here, segments_of
from orpo_data.places import file_sha256
from orpo_data.reuse import PARTS_NAME
from orpo_data.shards import open_shard, read_table
from orpo_data.steps.step import GlobalStep, Judgement, Step, StepOutput, dropped_rows

ROWS = [("a", tuple(range(1, 20, 2))), ("b", tuple(range(101, 114, 2)))]


@pytest.fixture
def parts(toys: Any) -> list[Any]:
    """17 rows in two parts."""
    return [toys.part(name, values) for name, values in ROWS]


@pytest.mark.parametrize(
    ("kinds", "segments"),
    [
        ("", [""]),
        ("w", ["w"]),
        ("wt", ["wt"]),
        ("f", ["", "f"]),
        ("wf", ["w", "f"]),
        ("fw", ["", "fw"]),
        ("fs", ["", "f", "s"]),
        ("wtfwst", ["wt", "fw", "st"]),
    ],
)
def test_a_chain_is_cut_before_every_global_step(toys: Any, kinds: str, segments: list[str]) -> None:
    names = {"w": "without", "t": "twice", "f": "first", "s": "shift"}
    chain = toys.chain([(names[kind], 2) for kind in kinds])
    found = segments_of(chain)
    assert ["".join(step.name[0] for step in segment.steps) for segment in found] == segments
    assert [step for segment in found for step in segment.steps] == chain
    assert [segment.number for segment in found] == list(range(len(segments)))
    for segment, after in zip(found, [*found[1:], None], strict=True):
        assert segment.first == sum(map(len, segments[: segment.number]))
        assert segment.following == (after.steps[0] if after else None)


def test_a_tally_is_the_sum_of_those_of_its_batches() -> None:
    one = Tally(rows_in=5, rows_out=4, dropped={"b": 1}, flagged={"x": 2})
    other = Tally(rows_in=3, expanded=2, rows_out=3, changed=1, dropped={"a": 1, "b": 1})
    total = Tally(rows_in=8, expanded=2, rows_out=7, changed=1, dropped={"a": 1, "b": 2}, flagged={"x": 2})
    assert one + other == other + one == total
    assert list((one + other).dropped) == ["a", "b"]
    total.check("sum")


# --- batches side by side --------------------------------------------------------------------------------------------


def test_only_a_few_batches_are_under_way() -> None:
    """So memory does not grow with the data."""
    read: list[int] = []

    def batches() -> Iterator[Any]:
        for i in range(1_000):
            read.append(i)
            yield i, i, i

    with ThreadPoolExecutor(2) as pool:
        results = _in_order(pool, 3, lambda a, b, c: a + b + c, batches())
        for taken, (batch, made) in enumerate(islice(results, 50), start=1):
            assert (batch, made) == ((taken - 1,) * 3, (taken - 1) * 3)
            assert len(read) <= taken + 3
        results.close()
    assert len(read) <= 53


class Meeting(Step):
    """Passes rows on once another thread is at it too."""

    name: ClassVar[str] = "meeting"
    version: ClassVar[int] = 1
    BARRIER: ClassVar[threading.Barrier] = threading.Barrier(2)

    def apply(self, table: pa.Table) -> StepOutput:
        self.BARRIER.wait(30)
        return StepOutput(table, _none_dropped(table))


def _none_dropped(table: pa.Table) -> pa.Table:
    return dropped_rows("", table.slice(0, 0), *[pa.array([], pa.string())] * 2)


def test_batches_of_a_part_and_of_two_parts_meet(toys: Any, tmp_path: Path) -> None:
    parts = [toys.part("a", (1, 2, 3, 4)), toys.part("b", (5,)), toys.part("c", (6,))]
    report = toys.run(tmp_path / "out", parts, [Meeting()], batch_rows=2)
    assert report.rows_out == 6
    assert read_table(tmp_path / "out")["value"].to_pylist() == [1, 2, 3, 4, 5, 6]


class Pools(Step):
    """Sees whether `tokenizers` would use threads of its own."""

    name: ClassVar[str] = "pools"
    version: ClassVar[int] = 1
    SEEN: ClassVar[list[str | None]] = []

    def apply(self, table: pa.Table) -> StepOutput:
        self.SEEN.append(os.environ.get("TOKENIZERS_PARALLELISM"))
        if 9 in table["value"].to_pylist():
            raise OSError("no space left")
        return StepOutput(table, _none_dropped(table))


@pytest.mark.parametrize(("said", "seen"), [(None, "false"), ("true", "true"), ("false", "false")])
def test_tokenizers_works_in_the_threads_of_the_batches(
    toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, seen: str
) -> None:
    """Unless the user said otherwise; what else the process does is as before, also when a batch fails."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if said:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", said)
    Pools.SEEN.clear()
    toys.run(tmp_path / "out", [toys.part("a", (1, 2, 3))], [Pools()], batch_rows=1)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == said
    with pytest.raises(OSError, match="no space left"):
        toys.run(tmp_path / "failed", [toys.part("a", (8, 9))], [Pools()], batch_rows=1)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == said
    assert set(Pools.SEEN) == {seen}


# --- failures --------------------------------------------------------------------------------------------------------


class Failing(GlobalStep):
    """Fails at the row of value 9, where it is told to."""

    name: ClassVar[str] = "failing"
    version: ClassVar[int] = 1
    at: str

    def note(self, table: pa.Table) -> pa.Table:
        self._fail("note", table)
        return table.select(["value"]).slice(0, len(table) - (self.at == "too few notes"))

    def judge(self, notes: Any) -> Judgement:
        for table in notes:
            self._fail("judge", table)
        return Judgement([table.slice(0, len(table) - (self.at == "too few verdicts")) for table in notes])

    def apply(self, table: pa.Table, verdicts: pa.Table) -> StepOutput:
        self._fail("apply", table)
        lost = self.at == "rows lost"
        return StepOutput(table.slice(0, len(table) - lost), _none_dropped(table))

    def _fail(self, at: str, table: pa.Table) -> None:
        if self.at == at and 9 in table["value"].to_pylist():
            raise ValueError(f"{at} failed")


FAILURES = {
    "note": (ValueError, "note failed"),
    "judge": (ValueError, "judge failed"),
    "apply": (ValueError, "apply failed"),
    "too few notes": (AssertionError, "step failing noted 1 of 2 rows"),
    "too few verdicts": (AssertionError, "step failing judged 9 of 10 rows"),
    "rows lost": (AssertionError, "step failing lost rows"),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("at", [*FAILURES, "source"])
def test_a_failure_arrives_and_leaves_things_as_they_were(
    toys: Any, parts: list[Any], tmp_path: Path, at: str, older: bool
) -> None:
    if older:
        toys.run(tmp_path / "out", [toys.part("b", (1, 3))], [("first", 2), ("shift", 2)])
    before = contents(tmp_path / "out")
    error, message = FAILURES.get(at, (OrpoError, "b broke off"))
    breaking = [parts[0], toys.part(*ROWS[1], breaks=4)] if at == "source" else parts
    chain = [*toys.chain([("without", 4), ("first", 50)]), Failing(at=at), *toys.chain([("shift", 2)])]
    threads = threading.active_count()
    with pytest.raises(error, match=message):
        toys.run(tmp_path / "out", breaking, chain, batch_rows=2)
    assert threading.active_count() == threads
    assert contents(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.notes"}
    for file in (tmp_path / ".out.notes").glob("*"):
        assert file.stem.endswith(file_sha256(file))
    toys.run(tmp_path / "out", parts, chain[:2], batch_rows=2)
    assert read_manifest(tmp_path / "out").rows == 17


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_set_aside_goes_when_it_has_been_read(toys: Any, parts: list[Any], tmp_path: Path) -> None:
    """However many global steps there are, one copy of the rows lies beside the output at the most."""
    seen = []

    def run_parts(segment: Any, runs: Any, *rest: Any) -> Any:
        if runs:
            seen.append(sorted(path.name for path in tmp_path.rglob("rows-*")))
        return run_here(segment, runs, *rest)

    toys.run(tmp_path / "out", parts, [("without", 4), ("first", 50), ("shift", 2), ("shift", 3)], run_parts=run_parts)
    assert seen == [[], ["rows-0"] * 2, ["rows-1"] * 2, ["rows-2"] * 2]


@pytest.mark.parametrize(
    ("batch_rows", "lengths"),
    [(1, [[4, 4, 2], [4, 3]]), (2, [[4, 4, 2], [4, 3]]), (3, [[6, 4], [6, 1]]), (99, [[10], [7]])],
)
def test_notes_are_judged_in_larger_batches(
    toys: Any, parts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int, lengths: Any
) -> None:
    """Who judges goes through them one after the other."""
    monkeypatch.setattr("orpo_data.parts.NOTED_TOGETHER", 4)
    (first,), seen = toys.chain([("first", 2)]), []

    class Watched(type(first)):
        def judge(self, notes: Sequence[pa.Table]) -> Judgement:
            seen.extend([len(chunk) for chunk in table["id"].chunks] for table in notes)
            assert [table["id"].to_pylist() for table in notes] == [
                [f"{part.name}{i:03d}" for i in range(part.rows)] for part in parts
            ]
            return super().judge(notes)

    toys.run(tmp_path / "out", parts, [Watched(**first.model_dump())], batch_rows=batch_rows)
    assert seen == lengths


def test_a_row_without_a_side_is_not_lost_in_silence(toys: Any, parts: list[Any], tmp_path: Path) -> None:
    class Routed(Step):
        name: ClassVar[str] = "routed"
        version: ClassVar[int] = 1
        sides: tuple[str | None, ...]

        def apply(self, table: pa.Table) -> StepOutput:
            sides = [self.sides[n % len(self.sides)] for n in table["value"].to_pylist()]
            return StepOutput(table.append_column("split", pa.array(sides, pa.string())), _none_dropped(table))

    toys.run(tmp_path / "out", parts, [Routed(sides=("train", "train", "eval"))], batch_rows=2)
    opened = {split: read_table(tmp_path / "out", split)["value"].to_pylist() for split in ("train", "eval")}
    assert opened == {
        "train": [n for part in parts for n in part.values if n % 3 < 2],
        "eval": [n for part in parts for n in part.values if n % 3 == 2],
    }
    with pytest.raises(AssertionError, match="a row without a split would be lost"):
        toys.run(tmp_path / "out", parts, [Routed(sides=("train", "train", None))], batch_rows=2)


def test_a_full_disk(toys: Any, parts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure lies not with a step but with what takes in what it made."""

    def full(self: Any, table: pa.Table) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("orpo_data.writing.ShardWriter.write", full)
    with pytest.raises(OSError, match="no space left"):
        toys.run(tmp_path / "out", parts, [("without", 3)], batch_rows=1)
    assert list(tmp_path.iterdir()) == []


class FailingOnce(Step):
    """Breaks off at its third batch, the first time."""

    name: ClassVar[str] = "failing_once"
    version: ClassVar[int] = 1
    CALLS: ClassVar[list[int]] = []

    def apply(self, table: pa.Table) -> StepOutput:
        self.CALLS.append(len(table))
        if len(self.CALLS) == 3:
            raise OSError("no space left")
        return StepOutput(table, _none_dropped(table))


def test_a_part_that_failed_may_be_tried_again(toys: Any, tmp_path: Path) -> None:
    """Nothing of the first attempt is counted."""
    (segment,) = segments_of([FailingOnce()])
    part = toys.part("a", tuple(range(20)))
    run = PartRun(part, tmp_path, next(part.read(1)).schema, "key")
    with pytest.raises(OSError, match="no space left"):
        run_here(segment, [run], 2, lambda rows: None)
    assert (run.done, run.rows_in, run.tallies) == (0, 0, [])
    run_here(segment, [run], 2, lambda rows: None)
    assert (run.done, run.rows_in, run.tallies) == (1, 20, [Tally(rows_in=20, rows_out=20)])
    assert [shard.rows for _, shard in run.shards] == [20]


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_shard_as_a_part(toys: Any, parts: list[Any], tmp_path: Path) -> None:
    toys.run(tmp_path / "out", parts, [])
    manifest = read_manifest(tmp_path / "out")
    pieces = [ShardPart(tmp_path / "out", shard) for shard in manifest.shards]
    assert [[len(table) for table in piece.read(4)] for piece in pieces] == [[4, 4, 2], [4, 3]]
    assert [piece.fingerprint for piece in pieces] == [shard.sha256 for shard in manifest.shards]
    assert pickle.loads(pickle.dumps(pieces)) == pieces


def test_verdicts_hash_the_same_in_any_chunks(toys: Any, parts: list[Any], tmp_path: Path) -> None:
    """Or a part would be worked on again because its notes had been taken in other batches."""
    (_, segment) = segments_of(toys.chain([("first", 2)]))
    whole = pa.table({"detail": pa.array([None, "later", None, "x"])})
    halves = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    hashes = set()
    for i, verdicts in enumerate([whole, halves, pa.concat_tables([whole, whole]).slice(4)]):
        run = PartRun(parts[0], tmp_path / str(i), whole.schema, "key")
        run.set_verdicts(segment.number, verdicts)
        assert open_shard(run.verdicts[segment.number]).equals(whole)
        hashes.add(run.verdict_sha256(segment))
    assert len(hashes) == 1


def test_a_record_says_what_became_of_a_part(toys: Any, tmp_path: Path) -> None:
    """By hand: b loses 3 and 9 to the first step, and 22 to the second, for which it is a's 2 once more."""
    parts = [toys.part("a", (1, 2)), toys.part("b", (3, 9, 4, 22))]
    toys.run(tmp_path / "out", parts, [("without", 3), ("first", 2)])
    one, other = orjson.loads((tmp_path / "out" / PARTS_NAME).read_bytes())
    assert (one["rows_in"], one["shards"], one["dropped"]) == (2, ["data-00000-of-00002.arrow"], 0)
    assert (other["rows_in"], other["shards"], other["dropped"]) == (4, ["data-00001-of-00002.arrow"], 3)
    assert [step["dropped"] for step in other["steps"]] == [{"reason_3": 2}, {"reason_2": 1}]
