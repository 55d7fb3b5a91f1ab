"""The data part of a run: from raw files to token ids, stage after stage."""

from pathlib import Path

from orpo_data.stage import StageReport
from pipelines import stages
from pipelines.layout import Layout
from pipelines.recipe import Recipe
from pipelines.stages import Progress, quiet


def prepare(recipe: Recipe, output: str | Path, progress: Progress = quiet) -> list[StageReport]:
    """Run every data stage of `recipe` into folders below `output`; stages that are up to date are left alone.

    Returns one report a stage, in order; the last one's path is the tokenized dataset that training reads.
    """
    place = Layout(output)
    reports = [stages.ingest(source, recipe, place.ingest(source.label), progress) for source in recipe.sources]
    reports.append(stages.binarize([report.path for report in reports], recipe, place.binarize, progress))
    reports.append(stages.clean(place.binarize, recipe, place.clean, progress))
    reports.append(stages.split(place.clean, recipe, place.split, progress))
    reports.append(stages.tokenize(place.split, recipe, place.tokenize, progress))
    return reports
