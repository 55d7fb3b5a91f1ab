"""Which answers `Binarize` picks: of many prompts at once, arrays in place of a loop over rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl
import pyarrow as pa

from orpo_data.sources.columns import Bools, Ints
from orpo_data.steps.draws import draws
from orpo_data.steps.ratings import ScoreRule

if TYPE_CHECKING:
    from orpo_data.steps.binarize import Binarize

Floats = np.ndarray[Any, np.dtype[np.float64]]

ROUNDING = 1e-5  # scores are float32: 8.3 - 8.2 must pass for a margin of 0.1


@dataclass(frozen=True)
class Answers:
    """The answers of many prompts, one behind the other."""

    columns: pl.DataFrame  # COMPLETION
    row: Ints  # which prompt each belongs to

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """Those of RATED rows."""
        completions = table["completions"].combine_chunks()
        rows = np.repeat(np.arange(len(table)), completions.value_lengths().to_numpy())
        return cls(pl.Series(completions.flatten()).struct.unnest(), rows)

    def scores(self, rule: ScoreRule, figures: Sequence[str]) -> Floats:
        """The score of each answer, NaN where it has none: the rule is asked once for each different set of figures."""
        bits = (self.columns[name].to_numpy().view(np.int32).tolist() for name in figures)  # parts 0 and -0.0
        sets = list(zip(*bits, strict=True))
        different = dict(zip(sets, range(len(sets)), strict=True))
        scores = map(rule, self.columns[[*different.values()]].select(figures).iter_rows(named=True))
        known = dict(zip(different, scores, strict=True))
        return np.array([*map(known.__getitem__, sets)], np.float64)


class Groups:
    """Runs of one number in an array."""

    def __init__(self, rows: Ints) -> None:
        self.starts = np.flatnonzero(np.diff(rows, prepend=-1))
        self.sizes = np.diff(self.starts, append=len(rows))
        self.rows = rows[self.starts]

    def first(self, wanted: Bools) -> Ints:
        """The place of the first wanted one of each group, which has one."""
        places = np.flatnonzero(wanted)
        return places[np.searchsorted(places, self.starts)]

    def extreme(self, values: Floats, which: np.ufunc) -> Ints:
        """The place of the first one of each group with its largest (np.maximum) or smallest value."""
        return self.first(values == np.repeat(which.reduceat(values, self.starts), self.sizes))


def picks(step: "Binarize", answers: Answers, scores: Floats, ids: pa.ChunkedArray) -> tuple[Ints, Ints]:
    """The places of the chosen and of the rejected answer of each pair."""
    place = np.flatnonzero(~np.isnan(scores))
    groups = Groups(answers.row[place])
    place = place[np.repeat(groups.sizes >= step.min_completions, groups.sizes)]
    groups = Groups(answers.row[place])
    best = np.repeat(place[groups.extreme(scores[place], np.maximum)], groups.sizes)
    lower = scores[place] < scores[best]
    if step.ties == "keep":
        lower |= ~_copies(answers.columns, place, best)
    lower &= scores[best] - scores[place] >= step.min_margin - ROUNDING
    place, best = place[lower], best[lower]
    if step.rejected == "all":
        return best, place
    groups = Groups(answers.row[place])
    if step.rejected == "random":
        drawn = draws(step.seed, "binarize", pl.Series(ids.take(pa.array(groups.rows))))
        picked = groups.starts + (drawn % groups.sizes.astype(np.uint64)).astype(np.int64)
    else:
        picked = groups.extreme(scores[place], np.maximum if step.rejected == "next-best" else np.minimum)
    return best[picked], place[picked]


def _copies(columns: pl.DataFrame, these: Ints, those: Ints) -> Bools:
    """Whether two answers are the same one of the same model."""
    same = [columns[name][these].eq_missing(columns[name][those]) for name in ("response", "model")]
    return (same[0] & same[1]).to_numpy()
