"""The work of a stage, cut in two directions: into parts of its input, and into segments of its chain of steps.

A part is one raw file or one shard of the dataset before. Parts go through the steps apart from each other, so they
can be worked on anywhere, and what an unchanged part came to can be taken over from an earlier run. Only a step that
needs the whole dataset ties them together: up to there the steps form a segment, at whose end rows are set aside and
noted; when all notes are judged, each part goes on with its verdicts through the next segment.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import pyarrow as pa
import pyarrow.compute as pc

from orpo_data.batches import batches_of
from orpo_data.cache import deliver
from orpo_data.manifest import Shard, Tally
from orpo_data.places import file_sha256, make_folder
from orpo_data.process import (
    few_full_collections,
    freed_memory_kept,
    threads_allocate_apart,
    tokenizing_in_own_threads,
)
from orpo_data.shards import open_shard, read_shard
from orpo_data.steps.step import AnyStep, GlobalStep, StepOutput
from orpo_data.writing import ShardWriter, StreamFile, WrittenShard, canonical

NOTED_TOGETHER = 8_000  # rows whose notes lie in one batch: who judges looks at one after the other


class Part(Protocol):
    """One piece of a stage's input; can be pickled."""

    @property
    def fingerprint(self) -> str:
        """Everything that its rows depend on."""

    @property
    def split(self) -> str | None: ...

    @property
    def size(self) -> int:
        """Bytes of what is read."""

    def read(self, batch_rows: int) -> Iterator[pa.Table]:
        """Its rows in order, in tables of at most `batch_rows`."""


@dataclass(frozen=True)
class ShardPart:
    """One shard of a dataset folder."""

    folder: Path
    shard: Shard

    @property
    def fingerprint(self) -> str:
        return self.shard.sha256

    @property
    def split(self) -> str | None:
        return self.shard.split

    @property
    def size(self) -> int:
        return self.shard.bytes

    def read(self, batch_rows: int) -> Iterator[pa.Table]:
        table = read_shard(self.folder, self.shard)
        return batches_of(table, batch_rows)


@dataclass(frozen=True)
class Segment:
    """Steps that a batch takes in one go; the first may be a global one, whose verdicts are known by then."""

    number: int
    first: int  # position of its first step in the chain
    steps: tuple[AnyStep, ...]
    following: GlobalStep | None  # the step that the rows are noted for

    def apply(self, table: pa.Table, verdicts: pa.Table | None, *, note: bool) -> "Applied":
        tallies, dropped = [], []
        for step in self.steps:
            if isinstance(step, GlobalStep):
                assert verdicts is not None
                output = step.apply(table, verdicts)
            else:
                output = step.apply(table)
            tallies.append(_tally(len(table), output))
            dropped.append(output.dropped)
            table = output.kept
        return Applied(table, tallies, dropped, self._note(table) if note else None)

    def _note(self, table: pa.Table) -> pa.Table | None:
        if self.following is None or not len(table):
            return None
        notes = self.following.note(table)
        assert len(notes) == len(table), f"step {self.following.name} noted {len(notes)} of {len(table)} rows"
        return notes


class Applied(NamedTuple):
    """What a segment made of a batch; tallies and dropped rows are those of its steps, in order."""

    rows: pa.Table
    tallies: list[Tally]
    dropped: list[pa.Table]
    notes: pa.Table | None


def segments_of(steps: Sequence[AnyStep]) -> list[Segment]:
    """A chain of steps, cut before every global one."""
    cuts = [position for position, step in enumerate(steps) if isinstance(step, GlobalStep)]
    segments = []
    for number, (first, end) in enumerate(zip([0, *cuts], [*cuts, len(steps)], strict=True)):
        following = steps[end] if end < len(steps) else None
        assert following is None or isinstance(following, GlobalStep)
        segments.append(Segment(number, first, tuple(steps[first:end]), following))
    return segments


def _tally(rows_in: int, output: StepOutput) -> Tally:
    reasons = {entry["values"]: entry["counts"] for entry in pc.value_counts(output.dropped["reason"]).to_pylist()}
    return Tally(
        rows_in=rows_in,
        expanded=output.expanded,
        rows_out=len(output.kept),
        changed=output.changed,
        dropped=reasons,
        flagged=dict(output.flagged),
    )


@dataclass(eq=False)
class PartRun:
    """A part on its way through the segments: where its rows lie, and what has been counted. Can be pickled."""

    part: Part
    folder: Path  # for what it sets aside
    schema: pa.Schema  # of the finished shards
    key: str  # hash of everything its rows depend on so far
    done: int = 0  # segments
    rows_in: int = 0
    tallies: list[Tally] = field(default_factory=list)
    rows: Path | None = None  # set aside by the last segment
    notes: dict[int, Path] = field(default_factory=dict)  # by the number of the segment at whose end they were taken
    verdicts: dict[int, Path] = field(default_factory=dict)  # by the number of the segment they stand before
    dropped: list[Path] = field(default_factory=list)
    shards: list[tuple[str | None, WrittenShard]] = field(default_factory=list)

    def update(self, after: "PartRun") -> None:
        """Take over the state of this very part after a segment, perhaps from another process."""
        vars(self).update(vars(after))

    def set_verdicts(self, number: int, verdicts: pa.Table) -> None:
        """What the first step of segment `number` decided on the rows that enter it."""
        spill = _Spill(self.file(f"verdicts-{number}"))
        spill.write(canonical(verdicts))  # their hash must not depend on how notes were batched
        if path := spill.close():
            self.verdicts[number] = path

    def verdict_sha256(self, segment: Segment) -> str | None:
        path = self.verdicts.get(segment.number)
        return file_sha256(path) if path else None

    def file(self, name: str) -> Path:
        make_folder(self.folder)
        return self.folder / name

    def batches(self, segment: Segment, batch_rows: int) -> Iterator[tuple[pa.Table, pa.Table | None]]:
        """The rows that enter a segment, with their verdicts."""
        verdicts = open_shard(self.verdicts[segment.number]) if segment.number in self.verdicts else None
        start = 0
        for table in self._entering(segment, batch_rows):
            yield table, None if verdicts is None else verdicts.slice(start, len(table))
            start += len(table)

    def _entering(self, segment: Segment, batch_rows: int) -> Iterator[pa.Table]:
        if segment.first == 0:  # no step has touched them
            yield from self.part.read(batch_rows)
        elif self.rows is not None:
            yield from batches_of(open_shard(self.rows), batch_rows)


class RunParts(Protocol):
    """Takes parts through a segment, here or elsewhere; returns them as they are then, in their order."""

    def __call__(
        self, segment: Segment, runs: Sequence[PartRun], batch_rows: int, progress: Callable[[int], None]
    ) -> Sequence[PartRun]:
        """`progress` is called with numbers of rows read from parts, which add up to all of them."""


@few_full_collections
@freed_memory_kept
def run_here(
    segment: Segment, runs: Sequence[PartRun], batch_rows: int, progress: Callable[[int], None]
) -> Sequence[PartRun]:
    """Batches of all parts side by side in the threads of this process, what they come to written in their order."""
    threads_allocate_apart()
    workers = os.cpu_count() or 1

    def work(run: PartRun, table: pa.Table, verdicts: pa.Table | None) -> Applied:
        return segment.apply(table, verdicts, note=segment.number not in run.notes)

    batches = ((run, *batch) for run in runs for batch in run.batches(segment, batch_rows))
    left = list(runs)
    with tokenizing_in_own_threads, ThreadPoolExecutor(workers) as pool:
        finished = _in_order(pool, workers + 1, work, batches)
        for run, results in groupby(finished, key=lambda item: item[0][0]):
            with _Sink(segment, run) as sink:
                for (_, table, _), applied in results:
                    sink.take(applied, rows_in=len(table))
                    if segment.number == 0:
                        progress(len(table))
            left.remove(run)
    for run in left:  # without any row
        with _Sink(segment, run):
            pass
    return runs


Batch = tuple[PartRun, pa.Table, pa.Table | None]
"""Rows of a part, and their verdicts."""


def _in_order(
    pool: Executor, ahead: int, work: Callable[[PartRun, pa.Table, pa.Table | None], Applied], batches: Iterable[Batch]
) -> Iterator[tuple[Batch, Applied]]:
    """Each batch with what the work makes of it, in order, with at most `ahead` of them under way."""
    running: deque[tuple[Batch, Future[Applied]]] = deque()
    try:
        for batch in batches:
            running.append((batch, pool.submit(work, *batch)))
            if len(running) > ahead:
                yield running[0][0], running.popleft()[1].result()
        while running:
            yield running[0][0], running.popleft()[1].result()
    finally:
        for _, future in running:
            future.cancel()


class _Sink:
    """Takes in what a segment made of the batches of one part."""

    def __init__(self, segment: Segment, run: PartRun) -> None:
        self._segment = segment
        self._run = run
        self._rows_in = 0
        self._tallies = [Tally() for _ in segment.steps]
        self._rows = _Spill(run.file(f"rows-{segment.number}"))
        self._notes = _Spill(run.file(f"notes-{segment.number}"), NOTED_TOGETHER)
        self._dropped = [_Spill(run.file(f"dropped-{segment.first + i}")) for i in range(len(segment.steps))]
        self._shards: dict[str | None, ShardWriter] = {}

    def __enter__(self) -> Self:
        return self

    def take(self, applied: Applied, rows_in: int) -> None:
        self._rows_in += rows_in
        self._tallies = [total + tally for total, tally in zip(self._tallies, applied.tallies, strict=True)]
        for spill, rows in zip(self._dropped, applied.dropped, strict=True):
            spill.write(rows)
        if self._segment.following is None:
            self._finish(applied.rows)
            return
        if self._segment.steps:
            self._rows.write(applied.rows)
        if applied.notes is not None:
            self._notes.write(applied.notes)

    def _finish(self, table: pa.Table) -> None:
        for split, rows in _route(self._run.part.split, table):
            if split not in self._shards:
                self._shards[split] = ShardWriter(self._run.file(f"shard-{split}"), self._run.schema)
            self._shards[split].write(rows)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close every file; what is left half-done goes with the folder of the stage."""
        noted = self._segment.following is not None and self._segment.number not in self._run.notes
        spills = [self._rows.close(), self._notes.close(always=noted), *[spill.close() for spill in self._dropped]]
        shards = [(split, shard) for split, writer in self._shards.items() for shard in writer.close()]
        if error is not None:
            return
        for step, tally in zip(self._segment.steps, self._tallies, strict=True):
            tally.check(step.name)
        run, (rows, notes, *dropped) = self._run, spills
        run.rows, run.done = rows, self._segment.number + 1
        if self._segment.number == 0:
            run.rows_in = self._rows_in
        run.tallies += self._tallies
        run.dropped += [path for path in dropped if path]
        run.shards = shards
        if notes:
            run.notes[self._segment.number] = notes


class _Spill:
    """Rows set aside in an Arrow stream file, so many at least in one batch of it."""

    def __init__(self, path: Path, together: int = 1) -> None:
        self._path = path
        self._together = together
        self._waiting: list[pa.Table] = []
        self._stream: StreamFile | None = None

    def write(self, table: pa.Table) -> None:
        if not len(table):
            return
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= self._together:
            self._write_waiting()

    def _write_waiting(self) -> None:
        rows, self._waiting = pa.concat_tables(self._waiting).combine_chunks(), []
        if self._stream is None:
            self._stream = StreamFile(self._path, rows.schema)
        self._stream.write(rows)

    def close(self, *, always: bool = False) -> Path | None:
        """The file; without any row there is none, or an empty one if there must `always` be one."""
        if self._waiting:
            self._write_waiting()
        if self._stream is None and always:
            self._stream = StreamFile(self._path, pa.schema([]))
        if self._stream is None:
            return None
        deliver(self._stream.close(), self._path)
        return self._path


def _route(split: str | None, table: pa.Table) -> Iterator[tuple[str | None, pa.Table]]:
    """A table whose rows carry a column `split` goes where it says; any other stays in its split."""
    if "split" not in table.schema.names:
        yield split, table
        return
    assert not table["split"].null_count, "a row without a split would be lost"
    for side in pc.unique(table["split"]).to_pylist():
        yield side, table.filter(pc.equal(table["split"], side)).drop_columns("split")
