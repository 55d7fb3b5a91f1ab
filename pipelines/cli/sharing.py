"""Commands that hand a dataset on: to another trainer, to other people."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from orpo_data.places import as_path
from pipelines.cli.app import DatasetArgument, JsonOption, print_json

ExportForm = Literal["axolotl", "llama-factory", "openai", "trl"]


def export(
    dataset: Annotated[
        Path,
        typer.Argument(
            metavar="DATASET",
            help="The folder of clean or split.",
            parser=as_path,
        ),
    ],
    to: Annotated[ExportForm, typer.Option(help="Whose form.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PLACE", help="A folder, for FORM.jsonl; or a file, NAME.jsonl. By default here."
        ),
    ] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Write cleaned pairs as JSON lines in the form of another trainer; of several splits, NAME-SPLIT.jsonl each."""
    from orpo_data.export import export as write_export

    files = write_export(dataset, to, output)
    if as_json:
        print_json([{"path": str(file.path), "split": file.split, "rows": file.rows} for file in files])
    else:
        for file in files:
            print(f"{file.path}: {file.rows:,} rows of {file.split}")


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
        print_json(vars(report))
        return
    for name, size in report.files.items():
        print(f"{size:>15,} bytes  {name}")
    for name in report.removed:
        print(f"{'removed':>21}  {name}")
    print(f"{len(report.files)} files, {sum(report.files.values()) / 1e6:,.1f} MB in {report.target}")
