"""One function a stage: datasets in, dataset out.

The command line, the flows and Python callers all call these. Every data stage has the same shape: what it reads, the
recipe, where it writes; it returns a StageReport.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import pyarrow as pa

from orpo_data.branch import Branch
from orpo_data.errors import OrpoError
from orpo_data.locking import writing
from orpo_data.manifest import Input, digest, read_manifest
from orpo_data.parts import RunParts, ShardPart
from orpo_data.places import without_secrets
from orpo_data.schema import JUDGED, PAIRS, TOKENIZED
from orpo_data.sources import SOURCES, require_columns
from orpo_data.sources.files import RawFile, file_digest, find_files, read_records
from orpo_data.sources.json_text import Limits
from orpo_data.stage import StageReport, dataset_input, run_stage
from orpo_data.steps.parse import Parse
from orpo_data.steps.sample import Sample, Take
from orpo_data.steps.split import SPLITS
from orpo_data.steps.step import AnyStep
from orpo_data.unopened import UnopenedChat
from pipelines.drift import reviewer
from pipelines.recipe import Recipe, SourceConfig

Progress = Callable[[str, int], None]
"""Called with the name of the running stage and the rows it has read."""


def quiet(stage: str, rows: int) -> None:
    """No progress wanted."""


class Work(TypedDict, total=False):
    """How a stage is worked on, which decides nothing about its rows."""

    batch_rows: int
    run_parts: RunParts


def ingest(
    source: SourceConfig, recipe: Recipe, output: Path, progress: Progress = quiet, **work: Unpack[Work]
) -> StageReport:
    """Raw files to RATED or PAIRS rows; records that cannot be parsed are dropped as `unparsable`."""
    kind = SOURCES[source.dataset]
    files = find_files(source.path, source.revision, source.files, kind.exclude)
    inputs = [Input(name=file.name, fingerprint=file_digest(file), revision=file.revision) for file in files]
    parts = [RawPart(source, file, item.fingerprint) for file, item in zip(files, inputs, strict=True)]
    branch = Branch(
        inputs=inputs,
        parts=parts,
        steps=[Parse(**source.model_dump(include={"dataset", "columns", "diverges", "max_record_bytes"}))],
        source=source.label,
    )
    return _run("ingest", output, kind.schema, [branch], recipe, progress, **work)


def binarize(
    inputs: Sequence[Path], recipe: Recipe, output: Path, progress: Progress = quiet, **work: Unpack[Work]
) -> StageReport:
    """Ingested datasets, one for each source of the recipe in its order, to one dataset of PAIRS."""
    if len(inputs) != len(recipe.sources):
        raise OrpoError(f"binarize: {len(inputs)} input folders for {len(recipe.sources)} sources")
    branches = []
    for folder, source in zip(inputs, recipe.sources, strict=True):
        steps: list[AnyStep] = [] if SOURCES[source.dataset].schema == PAIRS else [recipe.binarize]
        if source.count:
            steps.append(Take(count=source.count, seed=recipe.binarize.seed, source=source.label))
        elif source.weight < 1:
            steps.append(Sample(share=source.weight, seed=recipe.binarize.seed))
        branches.append(_dataset_branch(folder, output, steps, "ingest", source.label))
    return _run("binarize", output, PAIRS, branches, recipe, progress, seed=recipe.binarize.seed, **work)


def clean(inputs: Path, recipe: Recipe, output: Path, progress: Progress = quiet, **work: Unpack[Work]) -> StageReport:
    """PAIRS to JUDGED: what keeps every rule, and what the rules noticed."""
    decontaminate = recipe.decontaminate.step() if recipe.decontaminate else None
    steps = [step for step in (recipe.normalise, recipe.clean, recipe.dedup, decontaminate, recipe.label_noise) if step]
    branch = _dataset_branch(inputs, output, steps, "binarize")
    return _run("clean", output, JUDGED, [branch], recipe, progress, **work)


def split(inputs: Path, recipe: Recipe, output: Path, progress: Progress = quiet, **work: Unpack[Work]) -> StageReport:
    """JUDGED to a train and an eval side that share no prompt."""
    branch = _dataset_branch(inputs, output, [recipe.split], "clean")
    return _run("split", output, JUDGED, [branch], recipe, progress, splits=SPLITS, seed=recipe.split.seed, **work)


def tokenize(
    inputs: Path, recipe: Recipe, output: Path, progress: Progress = quiet, **work: Unpack[Work]
) -> StageReport:
    """JUDGED to TOKENIZED, split by split."""
    settings = recipe.tokenize
    chat = UnopenedChat(settings.tokenizer, settings.chat_template, settings.revision)
    branch = _dataset_branch(inputs, output, settings.steps(chat), "split")
    splits = read_manifest(inputs).splits
    return _run("tokenize", output, TOKENIZED, [branch], recipe, progress, splits=splits, **work)


def _run(
    stage: str,
    output: Path,
    schema: pa.Schema,
    branches: Sequence[Branch],
    recipe: Recipe,
    progress: Progress,
    *,
    splits: Sequence[str] = (),
    seed: int | None = None,
    **work: Unpack[Work],
) -> StageReport:
    with writing(output):
        return run_stage(
            stage,
            output,
            schema,
            branches,
            splits=splits,
            seed=seed,
            recipe=without_secrets(recipe.resolved()),
            job=recipe.name,
            progress=lambda rows: progress(stage, rows),
            review=reviewer(recipe.drift, output) if recipe.drift else None,
            **work,
        )


def _dataset_branch(
    folder: Path, output: Path, steps: Sequence[AnyStep], stage: str, source: str | None = None
) -> Branch:
    """A dataset folder as a branch; OrpoError if it is not the output of `stage`."""
    manifest = read_manifest(folder)
    if manifest.stage != stage:
        raise OrpoError(f"{folder}: is the output of {manifest.stage}, the output of {stage} is needed here")
    return Branch(
        inputs=[dataset_input(folder, output)],
        parts=[ShardPart(folder, shard) for shard in manifest.shards],
        steps=steps,
        source=source,
    )


@dataclass(frozen=True)
class RawPart:
    """One raw file."""

    source: SourceConfig
    file: RawFile
    digest: str
    split: None = None

    @property
    def fingerprint(self) -> str:
        """Of the name too: every row holds it."""
        return digest([self.file.name, self.digest])

    @property
    def size(self) -> int:
        """On the machine that found it."""
        return self.file.path.stat().st_size

    def read(self, batch_rows: int) -> Iterator[pa.Table]:
        """OrpoError if the first readable record lacks a column."""
        checked = False
        limits = Limits(self.source.max_record_bytes, self.source.max_array_bytes)
        for table in read_records(self.file.here(self.digest), self.source.label, batch_rows, limits):
            checked = checked or any(
                require_columns(self.source.dataset, record.as_py(), self.source.columns, self.file.name)
                for record in table["record"]
            )
            yield table
