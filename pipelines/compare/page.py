"""The page of a comparison, and its tables for a terminal and for Markdown."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orpo_data.pages.methods import HELD_OUT, hundredfold, methods_page, spread
from orpo_data.pages.render import figure
from orpo_data.places import write_whole
from pipelines.compare.plan import plan
from pipelines.recipe import Recipe

RESULT_NAME, PAGE_NAME = "comparison.json", "report.html"
Rows = list[list[str]]


def write_comparison(recipe: Recipe, root: Path, outcomes: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Write comparison.json and report.html into `root`/compare, each whole: the page's path, and the figures."""
    from pipelines.compare.results import collect

    comparison = collect(plan(recipe), outcomes, recipe, root)
    folder = root / "compare"
    write_whole(folder / RESULT_NAME, json.dumps(comparison, indent=1) + "\n")
    write_whole(folder / PAGE_NAME, methods_page(comparison))
    return folder / PAGE_NAME, comparison


def comparison_rows(comparison: Mapping[str, Any]) -> Iterator[Rows]:
    """The tables of a comparison, each with its head: win rates (where answers were judged), then held-out pairs."""
    if comparison["win_rates"]:
        others = list(next(iter(comparison["win_rates"].values())))
        rows = []
        for label, row in comparison["win_rates"].items():
            rows.append([label, *(spread(rate, 3, 100) for rate in row.values())])
            for name, key in (("  error over prompts", "error"), ("  at equal length", "equal_length")):
                rows.append([name, *(hundredfold(rate and rate[key]) for rate in row.values())])
        yield [["win rate, %", *(f"over {other}" for other in others)], *rows]
    if comparison["reward_models"]:
        rows = [[model["label"], figure(model["accuracy"], 3)] for model in comparison["reward_models"]]
        yield [["reward model", "accuracy"], *rows]
    rows = [[row["label"], *(spread(row[name], 3) for name in HELD_OUT)] for row in comparison["held_out"]]
    yield [[f"{comparison['pairs'].get('eval', 0):,} held-out pairs", *HELD_OUT], *rows]


def comparison_tables(comparison: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    return "\n\n".join(_markdown(table) for table in comparison_rows(comparison))


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *rows = table
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison_printed(comparison: Mapping[str, Any]) -> RenderableType:
    """The tables for a terminal, and a line for each job that failed."""
    tables = []
    for head, *rows in comparison_rows(comparison):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(head):
            table.add_column(name, justify="right" if number else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        tables.append(table)
    failures = [Text(f"{run['name']}: {run['error']}", "red") for run in comparison["failed"]]
    return Group(*tables, *failures)
