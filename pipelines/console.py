"""Where the command line prints, how a running stage shows, and what stages report."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from orpo_data.stage import StageReport
from pipelines.stages import Progress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def stage_progress() -> Iterator[Progress]:
    """A line on stderr for each running stage, with the rows read so far."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} rows"))
    # off a terminal the bar would leave an empty line behind
    with Bar(*columns, TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, rows: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None)
            bar.update(tasks[stage], completed=rows)

        yield show


def print_reports(reports: Sequence[StageReport]) -> None:
    """One line a stage: rows in, rows out, what was dropped and why."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "rows in", "rows out", "seconds"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    table.add_column("dropped")
    for report in reports:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        seconds = f"{report.seconds:.1f}" if report.ran else "unchanged"
        name = f"{report.stage} {report.path.name}" if report.stage == "ingest" else report.stage
        row = (name, f"{report.rows_in:,}", f"{report.rows_out:,}", seconds, dropped)
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
    if reports:
        out.print(Text(f"data   {reports[-1].path}"), soft_wrap=True)


def report_json(report: StageReport) -> dict[str, Any]:
    return vars(report) | {"path": str(report.path)}
