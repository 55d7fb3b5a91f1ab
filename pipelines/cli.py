"""The `orpo` command: one function a command, each a few lines around what Python callers use.

Results go to stdout, progress and logs to stderr. Everything heavy is imported inside the command that needs it.
The commands that start a Prefect flow are added in flows/cli.py: imports point one way.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orpo_data.errors import OrpoError, UsageError

if TYPE_CHECKING:
    from orpo_data.stage import StageReport
    from pipelines.jobs import TrainingJob
    from pipelines.recipe import Recipe

app = typer.Typer(
    name="orpo",
    help="Preference data from raw files to Arrow shards, and ORPO training on them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a ready recipe.", metavar="RECIPE")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write; by default runs/NAME.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.lambda=0.5.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DatasetArgument = Annotated[Path, typer.Argument(metavar="DATASET", help="A dataset folder.")]


StageName = Literal["ingest", "binarize", "clean", "split", "tokenize"]
ExportForm = Literal["axolotl", "llama-factory", "openai", "trl"]


@app.callback()
def setup_logging(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every detail to stderr.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    for name in ("orpo_data", "orpo_train", "pipelines", "flows"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


@app.command()
def prepare(
    recipe: RecipeArgument, output: OutputOption = None, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Run the data stages: raw files to token ids."""
    from pipelines.console import stage_progress
    from pipelines.preparation import prepare as run_prepare

    settings = read_recipe(recipe, overrides)
    with stage_progress() as progress:
        reports = run_prepare(settings, output or default_output(settings), progress)
    show_reports(reports, as_json)


@app.command()
def stage(
    name: Annotated[StageName, typer.Argument(help="Which stage.")],
    recipe: RecipeArgument,
    inputs: Annotated[
        Path | None, typer.Option("--input", metavar="DIR", help="The dataset to read; by default the stage before's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The dataset folder to write.")
    ] = None,
    overrides: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of tokenize: print the lengths and what limits cut; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run one data stage. `ingest` writes, and `binarize` reads, one folder a source below DIR."""
    from pipelines.console import stage_progress
    from pipelines.preparation import run_one

    settings = read_recipe(recipe, overrides)
    if dry_run:
        _dry_run(name, settings, inputs, as_json)
        return
    with stage_progress() as progress:
        reports = run_one(name, settings, default_output(settings), inputs, output, progress)
    show_reports(reports, as_json)


def _dry_run(name: StageName, settings: "Recipe", inputs: Path | None, as_json: bool) -> None:
    if name != "tokenize":
        raise UsageError(f"--dry-run: is for the stage tokenize, not for {name}")
    from pipelines.console import out, stage_progress
    from pipelines.dry_run import length_tables, measure_lengths

    with stage_progress() as progress:
        report = measure_lengths(inputs or default_output(settings) / "split", settings, progress)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        out.print(length_tables(report))


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe file, or the name of a ready recipe.")] = None,
    dataset: Annotated[Path | None, typer.Option(help="A tokenized dataset folder.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a local folder or a hub id.")] = None,
    output: OutputOption = None,
    overrides: SetOption = None,
    sweeps: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=VALUE,VALUE",
            help="Train once for each value of a key and compare, e.g. lambda=0.1,0.5,1.0; several form the product.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train on a tokenized dataset; a run, or a sweep of runs, that was interrupted goes on where it was."""
    from pipelines.jobs import sweep_jobs, training_job

    asked = (recipe, dataset, model, output, overrides or [])
    if sweeps:
        _train_sweep(sweep_jobs(sweeps, *asked), as_json)
        return
    job = training_job(*asked)
    from orpo_train.run import process_state
    from pipelines.training import train_model

    report = train_model(job.dataset, job.config, job.output, job=job.name, show_progress=True)
    if not process_state().is_main_process:
        return
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        print(report.summary())


def _train_sweep(jobs: "dict[str, TrainingJob]", as_json: bool) -> None:
    from orpo_train.run import process_state
    from pipelines.console import out
    from pipelines.sweep import comparison_table, train_sweep

    report = train_sweep(jobs, show_progress=True)
    if not process_state().is_main_process:
        return
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        out.print(comparison_table(report.comparison))
        print(report.path / "comparison.png")


@app.command()
def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="A trained model folder.", metavar="MODEL_DIR")],
    dataset: Annotated[Path, typer.Option(help="A tokenized dataset folder with an eval split.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write; by default beside the model.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a model on held-out pairs, before and after training."""
    from pipelines.console import out
    from pipelines.evaluation import evaluate_model, evaluation_table

    report = evaluate_model(model_dir, dataset, output or model_dir.parent / "evaluate")
    if as_json:
        print(json.dumps(report.result["after"] | {"path": str(report.path)}))
    else:
        out.print(evaluation_table(report.result))
        print(report.path / "report.html")


@app.command()
def inspect(
    dataset: DatasetArgument,
    rows: Annotated[int, typer.Option(help="How many rows of each split to show.", min=0)] = 2,
    full: Annotated[bool, typer.Option("--full", help="Show long texts whole.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Counts, lengths and sample rows; token ids are decoded with the loss mask shown."""
    from orpo_data.manifest import read_manifest

    manifest = read_manifest(dataset)
    if as_json:
        print(manifest.model_dump_json())
        return
    from pipelines.inspection import print_dataset

    print_dataset(dataset, manifest, rows, full)


@app.command()
def export(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="The folder of clean or split.")],
    to: Annotated[ExportForm, typer.Option(help="Whose form.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write; by default FORM.jsonl.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write cleaned pairs as JSON lines in the form of another trainer, one file a split."""
    from orpo_data.export import export as write_export

    files = write_export(dataset, to, output or Path(f"{to}.jsonl"))
    if as_json:
        print(json.dumps([{"path": str(file.path), "split": file.split, "rows": file.rows} for file in files]))
    else:
        for file in files:
            print(f"{file.path}: {file.rows:,} rows of {file.split}")


@app.command()
def verify(dataset: DatasetArgument, as_json: JsonOption = False) -> None:
    """Check every file against the manifest; exit 1 names what is broken."""
    import orpo_data

    report = orpo_data.verify(dataset)
    if as_json:
        print(json.dumps({"ok": report.ok, "files": report.files, "problems": report.problems}))
    elif report.ok:
        print(f"{dataset}: sound, {report.files} files, {report.rows:,} rows")
    else:
        for problem in report.problems:
            print(problem)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def lineage(
    dataset: DatasetArgument,
    row: Annotated[str | None, typer.Option(metavar="ID", help="A row's id, or its beginning.")] = None,
    file: Annotated[str | None, typer.Option(metavar="NAME", help="A raw file: where every row of it ended.")] = None,
    line: Annotated[int | None, typer.Option(help="A line of the file, counted from 1.", min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """The chain back to the raw files; for a row, or a line of a raw file, every decision made on it."""
    import orpo_data
    from pipelines.traces import lineage_json, print_lineage

    chain = orpo_data.lineage(dataset, row, file=file, line=line)
    if as_json:
        print(json.dumps(lineage_json(chain)))
    else:
        print_lineage(chain)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="A dataset folder.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another version of it, the output of the same stage.")],
    as_json: JsonOption = False,
) -> None:
    """Tell two versions of a dataset apart: rows that came, went and changed, why, and how distributions moved."""
    import orpo_data
    from pipelines.traces import print_diff

    found = orpo_data.diff(old, new)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        print_diff(found)


@app.command()
def push(
    dataset: DatasetArgument,
    to: Annotated[
        str, typer.Option("--to", metavar="PLACE", help="A hub id (name/dataset), a URL, or a folder (./there).")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Create the hub repository public; one that exists stays as it is.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a dataset with its card, report, parquet files and Croissant metadata; a damaged one is refused."""
    import orpo_data

    report = orpo_data.push(dataset, to, public=public)
    if as_json:
        print(json.dumps(vars(report)))
        return
    for name, size in report.files.items():
        print(f"{size:>15,} bytes  {name}")
    for name in report.removed:
        print(f"{'removed':>21}  {name}")
    print(f"{len(report.files)} files, {sum(report.files.values()) / 1e6:,.1f} MB in {report.target}")


def read_recipe(recipe: str, overrides: list[str] | None) -> "Recipe":
    from pipelines.recipe import Recipe

    return Recipe.read(recipe, overrides or [])


def default_output(recipe: "Recipe") -> Path:
    return Path("runs") / recipe.name


def show_reports(reports: "list[StageReport]", as_json: bool) -> None:
    from pipelines.console import print_reports, report_json

    if as_json:
        print(json.dumps([report_json(report) for report in reports]))
    else:
        print_reports(reports)


def run_app(application: Any = app) -> None:
    """Run the command line; an error the user can mend is one line and an exit code."""
    try:
        application()
    except UsageError as error:
        _fail(error, 2)
    except (OrpoError, OSError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(error: object, code: int) -> None:
    typer.secho(f"orpo: {' '.join(str(error).split())}", err=True, fg="red")
    raise SystemExit(code)
