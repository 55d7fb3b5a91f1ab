"""The data part of a run: from raw files to token ids, stage after stage."""

from pathlib import Path

from orpo_data.errors import UsageError
from orpo_data.locking import running
from orpo_data.process import few_full_collections
from orpo_data.stage import StageReport
from pipelines import stages
from pipelines.layout import Layout
from pipelines.recipe import Recipe
from pipelines.stages import Progress, quiet


@few_full_collections
def prepare(recipe: Recipe, output: str | Path, progress: Progress = quiet) -> list[StageReport]:
    """Run every data stage of `recipe` into folders below `output`; stages that are up to date are left alone.

    Returns one report a stage, in order; the last one's path is the tokenized dataset that training reads.
    Raises UsageError for a recipe whose parts are to be worked on by a cluster, which takes the flow.
    """
    if recipe.runner.kind != "local":
        raise UsageError(
            f"runner.kind: {recipe.runner.kind} takes the Prefect flow: `orpo run`, or --set runner.kind=local"
        )
    place = Layout(output)
    with running(place.root):
        return _prepare(recipe, place, progress)


def _prepare(recipe: Recipe, place: Layout, progress: Progress) -> list[StageReport]:
    reports = [stages.ingest(source, recipe, place.ingest(source.label), progress) for source in recipe.sources]
    reports.append(stages.binarize([report.path for report in reports], recipe, place.binarize, progress))
    reports.append(stages.clean(place.binarize, recipe, place.clean, progress))
    reports.append(stages.split(place.clean, recipe, place.split, progress))
    reports.append(stages.tokenize(place.split, recipe, place.tokenize, progress))
    return reports


PREVIOUS = {"binarize": "ingest", "clean": "binarize", "split": "clean", "tokenize": "split", "reference": "tokenize"}
ONE_INPUT = {"clean": stages.clean, "split": stages.split, "tokenize": stages.tokenize}


def run_one(
    name: str, recipe: Recipe, root: Path, inputs: Path | None, output: Path | None, progress: Progress = quiet
) -> list[StageReport]:
    """Run one stage by name, from `inputs` to `output`; what is not given lies where a run under `root` has it."""
    output = output or root / name
    if name == "ingest":
        return [stages.ingest(source, recipe, output / source.label, progress) for source in recipe.sources]
    inputs = inputs or root / PREVIOUS[name]
    if name == "binarize":
        return [stages.binarize([inputs / source.label for source in recipe.sources], recipe, output, progress)]
    if name == "reference":
        from pipelines.reference import reference  # imports torch

        return [reference(inputs, recipe, output, progress)]
    return [ONE_INPUT[name](inputs, recipe, output, progress)]
