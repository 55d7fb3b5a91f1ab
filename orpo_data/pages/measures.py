"""What is counted and measured of a dataset's rows, over all its shards."""

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from orpo_data.distributions import NUMBERS
from orpo_data.pages.charts import Numbers
from orpo_data.pages.rows import SMALL_COLUMNS, Rows, some_at_a_time
from orpo_data.schema import TOKEN_IDS

KINDS = {
    "rated": "Prompts, each with several rated answers.",
    "pairs": "Preference pairs: a prompt, a better and a worse answer, as messages.",
    "tokenized": "Preference pairs as token ids, ready for training: each side is prompt and answer in one sequence.",
}
MEASURED = {
    "pairs": (
        *("prompt_characters", "chosen_characters", "rejected_characters"),
        *("score_chosen", "score_rejected", "margin", "label_noise"),
    ),
    "tokenized": (
        *("prompt_tokens", "chosen_tokens", "rejected_tokens"),
        *("prompt_turns_dropped", "chosen_truncated", "rejected_truncated"),
    ),
}
"""Columns of `orpo_data.distributions`: each one float64 [rows], NaN where the row has no value."""

Places = npt.NDArray[np.int64]
NO_PLACES = np.empty(0, np.int64)

MOST_SOURCES = 4  # that are looked at one by one

Group = tuple[str | None, str | None, str | None]
"""Source, subset, split."""


def kind_of(schema: pa.Schema) -> str:
    names = set(schema.names)
    return "rated" if "completions" in names else "tokenized" if "chosen_input_ids" in names else "pairs"


@dataclass
class Measures:
    """Figures over all rows of a dataset."""

    schema: pa.Schema
    numbers: dict[str, Numbers] = field(default_factory=dict)
    sources: pl.Series = field(default_factory=lambda: pl.Series(dtype=pl.Categorical))  # of each row, as `numbers`
    groups: Counter[Group] = field(default_factory=Counter)
    models: dict[str, Counter[str]] = field(default_factory=dict)  # chosen, rejected or answers -> rows by model
    flags: Counter[tuple[str, str]] = field(default_factory=Counter)  # findings by rule and side
    flagged_at: dict[str, Places] = field(default_factory=dict)  # places of the rows that each rule flagged

    @property
    def kind(self) -> str:
        return kind_of(self.schema)

    @property
    def rows(self) -> int:
        return sum(self.groups.values())

    def finite(self, name: str) -> Numbers:
        """The values of a measure that there are."""
        values = self.numbers.get(name, np.array([]))
        return values[np.isfinite(values)]

    @property
    def flagged(self) -> dict[str, int]:
        """Rows by the rule that flagged them, the most frequent first."""
        counts = {rule: len(places) for rule, places in self.flagged_at.items()}
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def flagged_rows(self) -> int:
        """Rows with a flag, whatever the rule."""
        return len(np.unique(np.concatenate([*self.flagged_at.values(), NO_PLACES])))

    def largest_sources(self) -> list[str]:
        """Those that are looked at one by one."""
        return [source for source in self.by_source() if source is not None][:MOST_SOURCES]

    def by_source(self) -> dict[str | None, Counter[str | None]]:
        """Rows of each source by split, the largest source first."""
        rows: dict[str | None, Counter[str | None]] = {}
        for (source, _, split), count in self.groups.items():
            rows.setdefault(source, Counter())[split] += count
        return dict(sorted(rows.items(), key=lambda item: (-item[1].total(), str(item[0]))))


def measure(rows: Rows) -> Measures:
    """Look at every shard once."""
    found = Measures(rows.tables[0].schema)
    numbers: dict[str, array[float]] = defaultdict(lambda: array("d"))  # grown in place, for they are large
    sources = [found.sources]
    for split, shards in groupby(zip(rows.splits, rows.tables, strict=True), key=itemgetter(0)):
        tables = (table for _, table in shards)
        for frame in some_at_a_time(map(_measured, tables)):
            for name, values in _numbers(frame, found.kind).items():
                numbers[name].frombytes(values.tobytes())
            sources.append(frame["source"].cast(pl.Categorical))
            _count(frame, split, found)
    found.sources = pl.concat(sources, rechunk=True)
    found.numbers = {name: np.asarray(values) for name, values in numbers.items()}
    return found


def _measured(table: pa.Table) -> pa.Table:
    """The columns that something is measured of; of lists of token ids, most of a dataset, only how long they are."""
    table = table.select([name for name in table.schema.names if name == "source" or name not in SMALL_COLUMNS])
    for place, column in enumerate(table.schema):
        if column.type == TOKEN_IDS:
            lists = [pa.ListArray.from_arrays(ids.offsets, pa.nulls(len(ids.values))) for ids in table[place].chunks]
            table = table.set_column(place, column.name, pa.chunked_array(lists, pa.list_(pa.null())))
    return table


def _numbers(frame: pl.DataFrame, kind: str) -> dict[str, Numbers]:
    if kind == "rated":
        answers = frame["completions"].explode().struct.field("response")
        lengths = {"prompt_characters": frame.select(NUMBERS["prompt_characters"]).to_series()}
        lengths["answer_characters"] = answers.drop_nulls().str.len_chars()
        return {name: series.cast(pl.Float64).to_numpy() for name, series in lengths.items()}
    columns = {name: NUMBERS[name] for name in MEASURED[kind]}
    known = {name: column for name, column in columns.items() if {*column.meta.root_names()} <= {*frame.columns}}
    measured = frame.select(**known).cast(pl.Float64).fill_null(float("nan"))
    return {name: measured[name].to_numpy() for name in measured.columns}


def _count(frame: pl.DataFrame, split: str | None, found: Measures) -> None:
    subset = frame["subset"] if "subset" in frame.columns else pl.repeat(None, len(frame), dtype=pl.String, eager=True)
    for source, name, rows in pl.DataFrame({"a": frame["source"], "b": subset}).group_by("a", "b").len().iter_rows():
        found.groups[source, name, split] += rows
    models = {side: frame[f"model_{side}"] for side in ("chosen", "rejected") if f"model_{side}" in frame.columns}
    if "completions" in frame.columns:
        models["answers"] = frame["completions"].explode().struct.field("model")
    for side, names in models.items():
        found.models.setdefault(side, Counter()).update(dict(names.drop_nulls().value_counts().iter_rows()))
    if "flags" in frame.columns:
        _count_flags(frame, found, found.rows - len(frame))


def _count_flags(frame: pl.DataFrame, found: Measures, before: int) -> None:
    """`before` rows were read already."""
    flags = frame.select(at=pl.int_range(pl.len()) + before, flag="flags").filter(pl.col("flag").list.len() > 0)
    flags = flags.explode("flag").select("at", pl.col("flag").struct.unnest())
    found.flags.update({(rule, side): n for rule, side, n in flags.group_by("rule", "side").len().iter_rows()})
    for rule, places in flags.group_by("rule").agg(pl.col("at").unique().sort()).iter_rows():
        found.flagged_at[rule] = np.append(found.flagged_at.get(rule, NO_PLACES), places)
