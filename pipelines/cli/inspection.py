"""Commands that look at a dataset and change nothing: its rows, its bytes, its history, another version of it."""

from pathlib import Path
from typing import Annotated

import typer

from orpo_data.places import as_path
from pipelines.cli.app import DatasetArgument, JsonOption, print_json


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


def verify(dataset: DatasetArgument, as_json: JsonOption = False) -> None:
    """Check every file against the manifest; exit 1 names what is broken."""
    import orpo_data

    report = orpo_data.verify(dataset)
    if as_json:
        print_json({"ok": report.ok, "files": report.files, "problems": report.problems})
    elif report.ok:
        print(f"{dataset}: sound, {report.files} files, {report.rows:,} rows")
    else:
        for problem in report.problems:
            print(problem)
    if not report.ok:
        raise typer.Exit(1)


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
        print_json(lineage_json(chain))
    else:
        print_lineage(chain)


def diff(
    old: Annotated[
        Path,
        typer.Argument(
            metavar="OLD",
            help="A dataset folder.",
            parser=as_path,
        ),
    ],
    new: Annotated[
        Path,
        typer.Argument(
            metavar="NEW",
            help="Another version of it, the output of the same stage.",
            parser=as_path,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Tell two versions of a dataset apart: rows that came, went and changed, why, and how distributions moved."""
    import orpo_data
    from pipelines.traces import print_diff

    found = orpo_data.diff(old, new)
    if as_json:
        print_json(found.to_json())
    else:
        print_diff(found)
