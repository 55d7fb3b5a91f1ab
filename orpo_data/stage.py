"""A stage: a read, a chain of steps, one atomic write.

Rows stream through in batches, so memory does not grow with the data. Every step is counted and checked, and every
dropped row is kept aside. A stage whose inputs, configuration and step versions are unchanged is not run again; where
some of its input changed, only those parts are worked on.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from orpo_data import provenance
from orpo_data.batches import BATCH_ROWS
from orpo_data.branch import Branch, BranchRunner
from orpo_data.errors import OrpoError
from orpo_data.folders import refuse_foreign_folder
from orpo_data.manifest import FORMAT_VERSION, Input, Manifest, digest, read_manifest, write_manifest
from orpo_data.parts import RunParts, run_here
from orpo_data.process import few_full_collections, freed_memory_kept, trim
from orpo_data.reuse import Earlier, NoteCache, write_part_records
from orpo_data.shards import check_sizes
from orpo_data.verification import content_hash
from orpo_data.writing import DatasetWriter

log = logging.getLogger(__name__)

Review = Callable[[Path, Manifest], dict[str, Any]]
"""Looks at a finished folder before it takes its place: OrpoError keeps what is there, else returns a comparison."""


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


@few_full_collections
@freed_memory_kept
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
    run_parts: RunParts = run_here,
) -> StageReport:
    """Run a stage into the dataset folder `output`, unless it is there already.

    `splits` names the splits to create even if empty; `progress` is called with the rows read so far, `review` before
    the new rows take the place of older ones; `run_parts` decides where the work is done.
    Raises OrpoError when no row is left, or when `output` holds something else.
    """
    started = time.monotonic()
    refuse_foreign_folder(output)
    refuse_other_stage(output, stage)
    key = _key(stage, schema, branches)
    why = why_run(output, key)
    inputs = [item for branch in branches for item in branch.inputs]
    if not why:
        manifest = _as_found_now(output, inputs, recipe or {})
        return _report(output, manifest, ran=False, why="unchanged", started=started)
    from orpo_data.events import Recorder  # slow to import, and a stage that is up to date needs neither
    from orpo_data.report import write_pages

    log.info("%s: running into %s, %s", stage, output, why)
    notes = NoteCache(output)
    writes = DatasetWriter(output, schema, shared=run_parts is not run_here)
    with writes as writer, Recorder(job, stage, writer.folder, output) as recorder:
        recorder.start(inputs)
        writer.declare_splits(splits)
        runner = BranchRunner(stage, writer, Earlier(output), notes, batch_rows, _adding_up(progress), run_parts)
        finished = [runner.run(number, branch) for number, branch in enumerate(branches)]
        parts = [part for branch_parts, _ in finished for part in branch_parts]
        shards, dropped = writer.close()
        write_part_records(writer.folder, [part.record(writer.placed) for part in parts])
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            stage=stage,
            fingerprint=digest(key),
            content_hash=content_hash(shards, dropped),
            key=key,
            inputs=inputs,
            rows_in=sum(part.rows_in for part in parts),
            steps=[step for _, steps in finished for step in steps],
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
        trim()  # or what the steps needed would stay while the pages look at all rows
        write_pages(writer.folder, manifest)
        recorder.complete(manifest, schema)
        notes.prune()  # before the commit: after it a run that was killed would not come by here again
        writer.commit(manifest)
    trim()  # or every stage would begin with what the last one needed
    return _report(output, manifest, ran=True, why=why, started=started, diff=diff)


def _adding_up(progress: Callable[[int], None]) -> Callable[[int], None]:
    """From the rows of one batch after the other to `progress`, which wants those read so far."""
    total = 0

    def add(rows: int) -> None:
        nonlocal total
        total += rows
        progress(total)

    return add


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


def _as_found_now(output: Path, inputs: Sequence[Input], recipe: dict[str, Any]) -> Manifest:
    """The manifest of an output that is up to date, once it says where its inputs and its recipe's section lie now.

    The same bytes may lie elsewhere: what is on record must lead to an input, and to the tokenizer. The names of raw
    files stay those that its rows have, and a change of other sections is for the other stages to write down.
    """
    manifest = read_manifest(output)
    found = [old if new.path is None else new for old, new in zip(manifest.inputs, inputs, strict=True)]
    if manifest.inputs == found and manifest.recipe.get(manifest.stage) == recipe.get(manifest.stage):
        return manifest
    write_manifest(output, manifest.model_copy(update={"inputs": found, "recipe": recipe}))
    return read_manifest(output)


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


def _key(stage: str, schema: pa.Schema, branches: Sequence[Branch]) -> dict[str, Any]:
    """Everything the rows depend on: input contents, step versions, configuration. No file names, no times."""
    inputs = (item for branch in branches for item in branch.inputs)
    return {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "columns": [f"{column.name}: {column.type}" for column in schema],
        "inputs": [told for item in inputs for told in (item.fingerprint, item.content_hash) if told],
        "steps": [branch.describe(step) for branch in branches for step in branch.steps],
    }


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
