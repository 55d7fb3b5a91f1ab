"""How far the distributions of a dataset's columns moved between two versions.

Both distances are shares of rows, between 0 (same distribution) and 1 (nothing in common), need no bins, do not grow
with the number of rows and are the same in either direction:

- numbers: Kolmogorov-Smirnov, the largest difference between the two cumulative distributions, at any value. A null
  counts as smaller than every number, so that scores which vanish are seen.
- names (sources, models, splits): total variation, half the sum of the differences between the shares of each name; it
  is the share of rows that would have to get another name. A null is a name of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

SHOWN_NAMES = 8

CONTENT = pl.element().struct.field("content")
RESPONSE = pl.element().struct.field("response")


def _characters(side: str) -> pl.Expr:
    return pl.col(side).list.eval(CONTENT.str.len_chars()).list.sum()


NUMBERS: dict[str, pl.Expr] = {
    "prompt_characters": _characters("prompt"),
    "chosen_characters": _characters("chosen"),
    "rejected_characters": _characters("rejected"),
    "answers": pl.col("completions").list.len(),
    "answer_characters": pl.col("completions").list.eval(RESPONSE.str.len_chars()).list.mean(),
    "score_chosen": pl.col("score_chosen"),
    "score_rejected": pl.col("score_rejected"),
    "margin": pl.col("score_chosen") - pl.col("score_rejected"),
    "flags": pl.col("flags").list.len(),
    "label_noise": pl.col("label_noise"),
    "prompt_tokens": pl.col("prompt_len"),
    "chosen_tokens": pl.col("chosen_input_ids").list.len() - pl.col("prompt_len"),
    "rejected_tokens": pl.col("rejected_input_ids").list.len() - pl.col("prompt_len"),
    "prompt_turns_dropped": pl.col("prompt_turns_dropped"),
    "chosen_truncated": pl.col("chosen_truncated").cast(pl.Int8),
    "rejected_truncated": pl.col("rejected_truncated").cast(pl.Int8),
}
"""What is measured of a row, where it has the columns: characters of all turns together, tokens of an answer alone."""

NAMES: dict[str, pl.Expr] = {
    name: pl.col(name) for name in ("source", "subset", "model_chosen", "model_rejected", "split")
}


@dataclass(frozen=True)
class Shift:
    """How one column moved: `distance` as above; `old` and `new` say from where to where.

    Of numbers they hold median, p95 and mean (null where every value is); of names the shares of the eight that moved
    most.
    """

    column: str
    distance: float
    old: dict[str, float | None]
    new: dict[str, float | None]


def shifts(old: pl.LazyFrame, new: pl.LazyFrame) -> tuple[Shift, ...]:
    """Every column that both versions have and that is not null throughout, the one that moved most first."""
    found = []
    for columns, compare in ((NUMBERS, _number_shift), (NAMES, _name_shift)):
        before, after = (_measure(rows, columns) for rows in (old, new))
        for name in before.columns:
            if name in after.columns and not (before[name].is_null().all() and after[name].is_null().all()):
                found.append(compare(name, before[name], after[name]))
    return tuple(sorted(found, key=lambda shift: (-shift.distance, shift.column)))


def _measure(rows: pl.LazyFrame, columns: dict[str, pl.Expr]) -> pl.DataFrame:
    known = set(rows.collect_schema().names())
    return rows.select(
        **{name: expr for name, expr in columns.items() if known.issuperset(expr.meta.root_names())}
    ).collect()


def kolmogorov_smirnov(old: pl.Series, new: pl.Series) -> float:
    """max over x of |F_old(x) - F_new(x)|; exact, in whole numbers up to the last division."""
    excess = _excess(*(series.cast(pl.Float64).fill_null(float("-inf")) for series in (old, new))).sort("value")
    return int(np.abs(excess["excess"].cum_sum().to_numpy()).max()) / (len(old) * len(new))


def total_variation(old: pl.Series, new: pl.Series) -> float:
    """1/2 sum over names of |share in old - share in new|."""
    return int(_excess(old, new)["excess"].abs().sum()) / (2 * len(old) * len(new))


def _excess(old: pl.Series, new: pl.Series) -> pl.DataFrame:
    """For each value: (rows in old * rows of new) - (rows in new * rows of old)."""
    sides = [
        pl.select(value=series, excess=pl.lit(weight, pl.Int64))
        for series, weight in ((old, len(new)), (new, -len(old)))
    ]
    return pl.concat(sides).group_by("value").agg(pl.col("excess").sum())


def _number_shift(column: str, old: pl.Series, new: pl.Series) -> Shift:
    return Shift(column, kolmogorov_smirnov(old, new), _figures(old), _figures(new))


def _figures(series: pl.Series) -> dict[str, float | None]:
    figures: dict[str, Callable[[], object]] = {
        "median": series.median,
        "p95": lambda: series.quantile(0.95),
        "mean": series.mean,
    }
    found = {name: figure() for name, figure in figures.items()}
    return {name: float(value) if isinstance(value, int | float) else None for name, value in found.items()}


def _name_shift(column: str, old: pl.Series, new: pl.Series) -> Shift:
    excess = _excess(old, new).sort(pl.col("excess").abs(), pl.col("value"), descending=[True, False])
    shown = excess["value"].head(SHOWN_NAMES).to_list()
    return Shift(column, total_variation(old, new), _shares(old, shown), _shares(new, shown))


def _shares(series: pl.Series, names: list[str | None]) -> dict[str, float | None]:
    return {
        "none" if name is None else name: int(series.eq_missing(pl.Series([name], dtype=pl.String)).sum()) / len(series)
        for name in names
    }
