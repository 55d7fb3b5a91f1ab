"""A stage: a read, a chain of steps, one atomic write.

Rows stream through in batches, so memory does not grow with the data. Every step is counted and checked, every dropped
row is kept aside, and a stage whose inputs, configuration and step versions are unchanged is not run again.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orpo_data import provenance
from orpo_data.errors import OrpoError
from orpo_data.events import Recorder
from orpo_data.manifest import FORMAT_VERSION, Input, Manifest, StepCounts, digest, read_manifest
from orpo_data.report import write_pages
from orpo_data.shards import DatasetWriter, check_sizes, refuse_foreign_folder
from orpo_data.steps.step import AnyStep, GlobalStep, Step
from orpo_data.verification import content_hash

log = logging.getLogger(__name__)

BATCH_ROWS = 1_000

Batches = Iterator[tuple[str | None, pa.Table]]
"""Tables in order, each with the split it belongs to (None before the split stage)."""

Review = Callable[[Path, Manifest], dict[str, Any]]
"""Looks at a finished folder before it takes its place: OrpoError keeps what is there, else returns a comparison."""


@dataclass(frozen=True)
class Branch:
    """One input of a stage and the steps its rows take; several branches are written one after the other."""

    inputs: Sequence[Input]
    read: Callable[[int], Batches]  # from the most rows a table may have
    steps: Sequence[AnyStep]
    source: str | None = None


@dataclass(frozen=True)
class StageReport:
    """What every stage returns."""

    stage: str
    path: Path
    fingerprint: str
    content_hash: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    ran: bool
    why: str
    seconds: float = field(compare=False)
    diff: dict[str, Any] = field(default_factory=dict, compare=False)  # from the rows it replaced, where reviewed


@dataclass
class _Counter:
    """Counts what one step did; becomes a StepCounts."""

    step: AnyStep
    source: str | None
    rows_in: int = 0
    expanded: int = 0
    rows_out: int = 0
    changed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    flagged: dict[str, int] = field(default_factory=dict)

    def result(self, facts: dict[str, Any]) -> StepCounts:
        counts = {name: getattr(self, name) for name in ("rows_in", "expanded", "rows_out", "changed")}
        by_name = {name: dict(sorted(getattr(self, name).items())) for name in ("dropped", "flagged")}
        result = StepCounts(**_describe(self.step, self.source), **counts, **by_name, facts=facts)
        result.check()
        return result


def run_stage(
    stage: str,
    output: Path,
    schema: pa.Schema,
    branches: Sequence[Branch],
    *,
    splits: Sequence[str] = (),
    seed: int | None = None,
    recipe: dict[str, Any] | None = None,
    job: str = "orpo",
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[int], None] = lambda rows: None,
    review: Review | None = None,
) -> StageReport:
    """Run a stage into the dataset folder `output`, unless it is there already.

    `splits` names the splits to create even if empty; `progress` is called with the rows read so far, `review` before
    the new rows take the place of older ones.
    Raises OrpoError when no row is left, or when `output` holds something else.
    """
    started = time.monotonic()
    refuse_foreign_folder(output)
    refuse_other_stage(output, stage)
    key = _key(stage, schema, branches)
    why = why_run(output, key)
    if not why:
        return _report(output, read_manifest(output), ran=False, why="unchanged", started=started)
    log.info("%s: running into %s, %s", stage, output, why)
    inputs = [item for branch in branches for item in branch.inputs]
    with DatasetWriter(output, schema) as writer, Recorder(job, stage, writer.folder, output) as recorder:
        recorder.start(inputs)
        writer.declare_splits(list(splits))
        rows_in, steps = 0, list[StepCounts]()
        for branch in branches:
            rows, counts = _stream(branch, writer, batch_rows, _beyond(rows_in, progress))
            rows_in, steps = rows_in + rows, steps + counts
        shards, dropped = writer.close()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            stage=stage,
            fingerprint=digest(key),
            content_hash=content_hash(shards, dropped),
            key=key,
            inputs=inputs,
            rows_in=rows_in,
            steps=steps,
            shards=shards,
            dropped=dropped,
            files={},
            recipe=recipe or {},
            seed=seed,
            versions=provenance.package_versions(),
            git_commit=provenance.git_commit(),
        )
        if not manifest.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.drop_reasons.items())
            raise OrpoError(f"{stage}: no rows left of {manifest.rows_in} ({reasons or _empty(inputs)})")
        diff = review(writer.folder, manifest) if review else {}
        write_pages(writer.folder, manifest)
        recorder.complete(manifest, schema)
        writer.commit(manifest)
    return _report(output, manifest, ran=True, why=why, started=started, diff=diff)


def _empty(inputs: Sequence[Input]) -> str:
    more = f" and {len(inputs) - 3} more" if len(inputs) > 3 else ""
    return f"nothing is in {', '.join(item.name for item in inputs[:3])}{more}"


def dataset_input(folder: Path, output: Path) -> Input:
    """A dataset folder as the input of the stage that writes `output`."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    return Input(
        name=folder.name,
        path=provenance.relative_path(folder, output),
        stage=manifest.stage,
        fingerprint=manifest.fingerprint,
        content_hash=manifest.content_hash,
    )


def refuse_other_stage(output: Path, stage: str) -> None:
    """OrpoError if `output` is the dataset of another stage, perhaps the very input of this one."""
    try:
        holds = read_manifest(output).stage
    except OrpoError:
        return  # nothing there, or damaged
    if holds != stage:
        raise OrpoError(f"{output}: holds the output of {holds}; choose another folder for that of {stage}")


def why_run(output: Path, key: dict[str, Any]) -> str:
    """Why the stage must run, in words; empty if `output` is complete and made from the same key."""
    if not output.exists() or not any(output.iterdir()):
        return "no output yet"
    try:
        manifest = read_manifest(output)
        check_sizes(output, manifest)
    except OrpoError as error:
        return f"the output is damaged: {error}"
    changes = list(key_changes(manifest.key, key))
    return "changed: " + "; ".join(changes) if changes else ""


def key_changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Where two keys differ, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from key_changes(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from key_changes(a, b, f"{path}[{index}]")
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}...({len(text)} characters)"


def _describe(step: AnyStep, source: str | None) -> dict[str, Any]:
    return {"step": step.name, "version": step.version, "source": source, "config": step.model_dump(mode="json")}


def _key(stage: str, schema: pa.Schema, branches: Sequence[Branch]) -> dict[str, Any]:
    """Everything the rows depend on: input contents, step versions, configuration. No file names, no times."""
    return {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "columns": [f"{column.name}: {column.type}" for column in schema],
        "inputs": [item.fingerprint for branch in branches for item in branch.inputs],
        "steps": [_describe(step, branch.source) for branch in branches for step in branch.steps],
    }


def _stream(
    branch: Branch, writer: DatasetWriter, batch_rows: int, progress: Callable[[int], None]
) -> tuple[int, list[StepCounts]]:
    """Send every row of a branch through its steps into the writer: rows read, and the counts of each step."""
    counters = [_Counter(step, branch.source) for step in branch.steps]
    steps = _summarise_global_steps(branch, batch_rows)
    rows = 0
    for split, table in branch.read(batch_rows):
        rows += len(table)
        for step, counter in zip(steps, counters, strict=True):
            table = _apply(step, table, counter, writer.write_dropped)
        for side, part in _route(split, table):
            writer.write(part, side)
        progress(rows)
    return rows, [counter.result(step.facts()) for counter, step in zip(counters, steps, strict=True)]


def _beyond(before: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    """`progress` for one of several branches: it goes on from the rows of those before."""
    return lambda rows: progress(before + rows)


def _apply(step: Step, table: pa.Table, counter: _Counter, keep_dropped: Callable[[pa.Table], None]) -> pa.Table:
    output = step.apply(table)
    counter.rows_in += len(table)
    counter.expanded += output.expanded
    counter.changed += output.changed
    counter.rows_out += len(output.kept)
    if len(output.dropped):
        keep_dropped(output.dropped)
        _add_counts(counter.dropped, output.dropped["reason"])
    for rule, rows in output.flagged.items():
        counter.flagged[rule] = counter.flagged.get(rule, 0) + rows
    return output.kept


def _add_counts(totals: dict[str, int], values: pa.ChunkedArray) -> None:
    for entry in pc.value_counts(values).to_pylist():
        totals[entry["values"]] = totals.get(entry["values"], 0) + entry["counts"]


def _summarise_global_steps(branch: Branch, batch_rows: int) -> list[Step]:
    """Run the first pass of every step that needs the whole dataset, over what the steps before it let through."""
    ready: list[Step] = []
    for step in branch.steps:
        if isinstance(step, GlobalStep):
            ready.append(step.summarise(_rows_after(branch, list(ready), batch_rows)))
        else:
            ready.append(step)
    return ready


def _rows_after(branch: Branch, steps: Sequence[Step], batch_rows: int) -> Iterator[pa.Table]:
    for _, table in branch.read(batch_rows):
        for step in steps:
            table = step.apply(table).kept
        yield table


def _route(split: str | None, table: pa.Table) -> Iterator[tuple[str | None, pa.Table]]:
    """A table whose rows carry a column `split` goes where it says; any other stays in its split."""
    if "split" not in table.schema.names:
        yield split, table
        return
    for side in pc.unique(table["split"]).to_pylist():
        yield side, table.filter(pc.equal(table["split"], side)).drop_columns("split")


def _report(
    output: Path, manifest: Manifest, *, ran: bool, why: str, started: float, diff: dict[str, Any] | None = None
) -> StageReport:
    return StageReport(
        stage=manifest.stage,
        path=output,
        fingerprint=manifest.fingerprint,
        content_hash=manifest.content_hash,
        rows_in=manifest.rows_in,
        rows_out=manifest.rows,
        dropped=manifest.drop_reasons,
        ran=ran,
        why=why,
        seconds=time.monotonic() - started,
        diff=diff or {},
    )
