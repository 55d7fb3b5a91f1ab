"""What each step of a stage did to its pairs as a whole: how many there were before and after it, how long, how clear.

A row counts until the step that dropped it, measured as it entered that step; the kept ones are measured as they are
now. So only what stood before a step that changed texts has to be read from the input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from orpo_data.distributions import NUMBERS
from orpo_data.manifest import Manifest
from orpo_data.pages.measures import Measures
from orpo_data.pages.rows import Rows
from orpo_data.schema import ANSWERS

FIGURES = ("prompt_characters", "chosen_characters", "rejected_characters", "margin")
SOURCE = pl.col("source").cast(pl.Categorical)
MEASURED = {name: NUMBERS[name].cast(pl.Float64) for name in FIGURES}

TURNS = pl.List(pl.Struct({"content": pl.String}))
SCORES = {"score_chosen": pl.Float64, "score_rejected": pl.Float64}
PAIR = pl.Struct({"prompt": TURNS, "chosen": TURNS, "rejected": TURNS, **SCORES})
"""As much of a dropped row as is measured."""


@dataclass(frozen=True)
class Standing:
    """The pairs of one source after a step, or (`step` is null) as they came in; unknown figures are null."""

    step: str | None
    rows: int = 0
    prompt: float | None = None  # medians, in characters
    chosen: float | None = None
    rejected: float | None = None
    chosen_longer: float | None = None  # share of the pairs
    margin: float | None = None  # median, in the source's unit


def effects(manifest: Manifest, measures: Measures, dropped: Rows, came_in: Rows | None) -> dict[str, list[Standing]]:
    """Where the pairs of each of the largest sources stood before the first step and after each.

    Nothing of a stage that does not judge the pairs of all sources together. `came_in` are the rows that it read.
    """
    steps = [step.step for step in manifest.steps]
    if measures.kind != "pairs" or not steps or any(step.source is not None for step in manifest.steps):
        return {}
    rows = pl.concat([_kept(measures, last=len(steps)), _dropped(dropped, steps)])
    stands: list[tuple[str | None, pl.DataFrame, pl.Expr]] = []
    if not any(step.changed for step in manifest.steps):
        stands.append((None, rows, pl.lit(True)))
    elif came_in is not None and {"chosen", *SCORES} <= {*came_in.columns}:
        stands.append((None, _came_in(came_in), pl.lit(True)))
    stands += [(step, rows, pl.col("last") > index) for index, step in enumerate(steps)]
    return {
        source: [_standing(step, rows, counts & (pl.col("source") == source)) for step, rows, counts in stands]
        for source in measures.largest_sources()
    }


def _standing(step: str | None, rows: pl.DataFrame, counts: pl.Expr) -> Standing:
    """Of those rows that count; one column at a time, for a median takes a copy of it."""
    longer = pl.col("chosen_characters") > pl.col("rejected_characters")
    figures = {"rows": counts.sum(), "chosen_longer": longer.filter(counts).mean()}
    figures |= {name.removesuffix("_characters"): pl.col(name).filter(counts).median() for name in MEASURED}
    return Standing(step, **{name: rows.select(figure).item() for name, figure in figures.items()})


def _kept(measures: Measures, last: int) -> pl.DataFrame:
    """A row each: source, figures, and the index of the step that dropped it, which is `last` as none did."""
    figures = {name: pl.Series(measures.numbers[name], dtype=pl.Float64).fill_nan(None) for name in MEASURED}
    return pl.DataFrame({"source": measures.sources, **figures}).with_columns(last=pl.lit(last, pl.Int64))


def _dropped(dropped: Rows, steps: Sequence[str]) -> pl.DataFrame:
    places = pl.col("step").replace_strict({step: index for index, step in enumerate(steps)}, return_dtype=pl.Int64)
    found = []
    for rows in dropped.frames("id", "source", "step", "row"):
        pairs = rows.filter(pl.col("id").is_not_null())  # else a raw record
        pairs = pairs.select("source", "step", pl.col("row").str.json_decode(PAIR).struct.unnest())
        found.append(pairs.select(SOURCE, **MEASURED, last=places))
    return pl.concat(found)


def _came_in(came_in: Rows) -> pl.DataFrame:
    return pl.concat(
        [rows.select(SOURCE, **MEASURED) for rows in came_in.frames("source", "prompt", *ANSWERS, *SCORES)]
    )
