"""One input of a stage and the steps its rows take: from parts to finished shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from orpo_data.manifest import FORMAT_VERSION, Input, PartRecord, StepCounts, Tally, digest
from orpo_data.mapped import let_go
from orpo_data.parts import Part, PartRun, RunParts, Segment, run_here, segments_of
from orpo_data.process import trim
from orpo_data.reuse import Earlier, EarlierPart, NoteCache, open_notes
from orpo_data.shards import open_shard
from orpo_data.steps.step import AnyStep, Step
from orpo_data.writing import DatasetWriter, WrittenShard


@dataclass(frozen=True)
class Branch:
    """Several branches of a stage are written one after the other."""

    inputs: Sequence[Input]
    parts: Sequence[Part]
    steps: Sequence[AnyStep]
    source: str | None = None

    def describe(self, step: AnyStep) -> dict[str, Any]:
        """A step as the manifest and the fingerprint have it."""
        config = step.model_dump(mode="json")
        return {"step": step.name, "version": step.version, "source": self.source, "config": config}


@dataclass(frozen=True)
class FinishedPart:
    """What a part came to, in this run or an earlier one."""

    key: str
    rows_in: int
    tallies: Sequence[Tally]
    shards: list[tuple[str | None, WrittenShard]]
    dropped: int

    def record(self, placed: dict[Path, str]) -> PartRecord:
        """For the next run; `placed` has the final paths of shards."""
        return PartRecord(
            key=self.key,
            rows_in=self.rows_in,
            steps=list(self.tallies),
            shards=[placed[shard.file] for _, shard in self.shards],
            dropped=self.dropped,
        )


class BranchRunner:
    """Runs branches, part by part, into a dataset folder; what has not changed is taken from the earlier output."""

    def __init__(
        self,
        stage: str,
        writer: DatasetWriter,
        earlier: Earlier,
        notes: NoteCache,
        batch_rows: int,
        progress: Callable[[int], None],
        run_parts: RunParts = run_here,
    ) -> None:
        """`progress` is called with the rows of every batch read."""
        self._stage = stage
        self._writer = writer
        self._earlier = earlier
        self._notes = notes
        self._batch_rows = batch_rows
        self._progress = progress
        self._run_parts = run_parts

    def run(self, number: int, branch: Branch) -> tuple[list[FinishedPart], list[StepCounts]]:
        """Every part of branch `number` in order, and what the steps did with all of them."""
        segments = segments_of(branch.steps)
        runs = [self._begin(branch, part, f"{number}-{i:05d}") for i, part in enumerate(branch.parts)]
        facts = [step.facts() if isinstance(step, Step) else {} for step in branch.steps]
        for segment in segments:
            steps = [branch.describe(step) for step in segment.steps]
            for run in runs:
                run.key = digest([run.key, run.verdict_sha256(segment), steps])
            if segment.following:
                self._take_notes(segments[: segment.number + 1], runs, branch.describe(segment.following))
                facts[segment.first + len(steps)] = _judge(segment, runs)
                let_go()  # of the notes of all rows, and of what it took to judge them
                trim()
        parts = self._finish(segments, runs)
        counts = [
            StepCounts(
                **branch.describe(step),
                **sum((part.tallies[i] for part in parts), Tally()).model_dump(),
                facts=facts[i],
            )
            for i, step in enumerate(branch.steps)
        ]
        return parts, counts

    def _begin(self, branch: Branch, part: Part, name: str) -> PartRun:
        columns = [f"{column.name}: {column.type}" for column in self._writer.schema]
        key = digest([FORMAT_VERSION, self._stage, columns, branch.source, part.fingerprint, part.split])
        return PartRun(part, self._writer.work / name, self._writer.schema, key)

    def _advance(self, segments: Sequence[Segment], runs: Sequence[PartRun]) -> None:
        """Bring parts through the segments they have not passed yet."""
        for segment in segments:
            behind = [run for run in runs if run.done == segment.number]
            spent = [run.rows for run in behind]
            after = self._run_parts(segment, behind, self._batch_rows, self._progress)
            for run, state, rows in zip(behind, after, spent, strict=True):
                run.update(state)
                if rows:
                    rows.unlink()  # or every segment would leave a copy of the dataset until the end

    def _take_notes(self, segments: Sequence[Segment], runs: Sequence[PartRun], step: dict[str, Any]) -> None:
        """Notes on every part at the end of the last of the segments, as `step` wants them."""
        number = segments[-1].number
        keys = {run.folder: digest([run.key, step]) for run in runs}
        for run in runs:
            if found := self._notes.find(keys[run.folder]):
                run.notes[number] = found
        missing = [run for run in runs if number not in run.notes]
        self._advance(segments, missing)
        for run in missing:
            run.notes[number] = self._notes.keep(keys[run.folder], run.notes[number])

    def _finish(self, segments: Sequence[Segment], runs: Sequence[PartRun]) -> list[FinishedPart]:
        """Hand the shards and dropped rows of every part to the dataset folder."""
        known = {run.folder: earlier for run in runs if (earlier := self._earlier.part(run.key))}
        self._advance(segments, [run for run in runs if run.folder not in known])
        parts = []
        for run in runs:
            part, dropped = self._come_to(run, known.get(run.folder))
            if run.rows_in < part.rows_in:
                self._progress(part.rows_in - run.rows_in)
            for split, shard in part.shards:
                self._writer.adopt(shard, split)
            for table in dropped:
                self._writer.write_dropped(table)
            parts.append(part)
        return parts

    def _come_to(self, run: PartRun, earlier: EarlierPart | None) -> tuple[FinishedPart, list[pa.Table]]:
        """What a part came to now or earlier, and its dropped rows."""
        return _taken_over(earlier, self._writer.aside / run.folder.name) if earlier else _finished(run)


def _judge(segment: Segment, runs: Sequence[PartRun]) -> dict[str, Any]:
    """Put the verdicts of the step behind `segment` where its next segment finds them; the step's facts."""
    assert segment.following
    noted = [(run, notes) for run in runs if len(notes := open_notes(run.notes[segment.number]))]
    judgement = segment.following.judge([notes for _, notes in noted])
    for (run, notes), verdicts in zip(noted, judgement.verdicts, strict=True):
        assert len(verdicts) == len(notes), f"step {segment.following.name} judged {len(verdicts)} of {len(notes)} rows"
        run.set_verdicts(segment.number + 1, verdicts)
    return judgement.facts


def _finished(run: PartRun) -> tuple[FinishedPart, list[pa.Table]]:
    """And its dropped rows."""
    dropped = [open_shard(path) for path in run.dropped]
    return FinishedPart(run.key, run.rows_in, run.tallies, run.shards, sum(map(len, dropped))), dropped


def _taken_over(earlier: EarlierPart, aside: Path) -> tuple[FinishedPart, list[pa.Table]]:
    """And its dropped rows; its shards once more in the folder `aside`."""
    record = earlier.record
    part = FinishedPart(record.key, record.rows_in, record.steps, earlier.link(aside), record.dropped)
    return part, [earlier.dropped] if record.dropped else []
