"""Commands that make data: all the stages, or one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orpo_data.errors import UsageError
from orpo_data.places import as_path
from pipelines.cli.app import (
    JsonOption,
    OutputOption,
    RecipeArgument,
    SetOption,
    default_output,
    print_json,
    read_recipe,
)

if TYPE_CHECKING:
    from orpo_data.stage import StageReport
    from pipelines.recipe import Recipe

StageName = Literal["ingest", "binarize", "clean", "split", "tokenize", "reference"]


def prepare(
    recipe: RecipeArgument, output: OutputOption = None, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Run the data stages: raw files to token ids."""
    from pipelines.console import stage_progress
    from pipelines.preparation import prepare as run_prepare

    settings = read_recipe(recipe, overrides)
    with stage_progress() as progress:
        reports = run_prepare(settings, output or default_output(settings), progress)
    _show_reports(reports, as_json)


def stage(
    name: Annotated[StageName, typer.Argument(help="Which stage.")],
    recipe: RecipeArgument,
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="DIR",
            help="The dataset to read; by default the stage before's.",
            parser=as_path,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The dataset folder to write.",
            parser=as_path,
        ),
    ] = None,
    overrides: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of tokenize: print the lengths and what limits cut; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run one data stage. `ingest` writes, and `binarize` reads, one folder a source below DIR.

    `reference` adds the log-probabilities that the objectives dpo, ipo and kto need.
    """
    from pipelines.console import stage_progress
    from pipelines.preparation import run_one

    settings = read_recipe(recipe, overrides)
    if dry_run:
        _dry_run(name, settings, inputs, as_json)
        return
    with stage_progress() as progress:
        reports = run_one(name, settings, default_output(settings), inputs, output, progress)
    _show_reports(reports, as_json)


def _dry_run(name: StageName, settings: "Recipe", inputs: Path | None, as_json: bool) -> None:
    if name != "tokenize":
        raise UsageError(f"--dry-run: is for the stage tokenize, not for {name}")
    from pipelines.console import out, stage_progress
    from pipelines.dry_run import length_tables, measure_lengths

    with stage_progress() as progress:
        report = measure_lengths(inputs or default_output(settings) / "split", settings, progress)
    if as_json:
        print_json(report.to_json())
    else:
        out.print(length_tables(report))


def _show_reports(reports: "list[StageReport]", as_json: bool) -> None:
    from pipelines.console import print_reports, report_json

    if as_json:
        print_json([report_json(report) for report in reports])
    else:
        print_reports(reports)
