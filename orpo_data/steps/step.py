"""What a step is: a named, versioned, configured, pure function from a table to kept rows and dropped rows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from orpo_data.schema import DROPPED, no_rows


@dataclass(frozen=True)
class StepOutput:
    """What one step made of one table: len(table) + expanded == len(kept) + len(dropped)."""

    kept: pa.Table
    dropped: pa.Table
    expanded: int = 0  # rows made beyond one for each row in (several pairs from one prompt)
    changed: int = 0  # kept rows whose content the step altered
    flagged: Mapping[str, int] = field(default_factory=dict)  # kept rows by the rule that flagged them in this step


class _Configured(BaseModel, ABC):
    """Its fields are a step's configuration, read straight from the recipe.

    A subclass raises `version` whenever it would make other rows of the same input: the version is part of every
    dataset's fingerprint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str]
    version: ClassVar[int]


class Step(_Configured):
    """Judges or transforms each row on its own."""

    def facts(self) -> dict[str, Any]:
        """What else the manifest should say of this step: plain JSON values, the same whatever the rows' order."""
        return {}

    @abstractmethod
    def apply(self, table: pa.Table) -> StepOutput:
        """Judge or transform the rows of `table`, each on its own: batching must not change the outcome."""


@dataclass(frozen=True)
class Judgement:
    """What a global step decided: a table for every part, with verdicts row by row, and facts for the manifest."""

    verdicts: Sequence[pa.Table]
    facts: dict[str, Any] = field(default_factory=dict)  # plain JSON values, the same whatever the rows' order


class GlobalStep(_Configured):
    """Judges rows in the light of all others: notes on each part, one judgement over all notes, verdicts applied.

    A part is one shard of the input; parts are noted and judged apart, perhaps on other machines, and what an unchanged
    part came to is not worked out again. Only `judge` sees the whole dataset, and of it only the notes.
    """

    @abstractmethod
    def note(self, table: pa.Table) -> pa.Table:
        """What must be known of the rows to judge them among all: a row for each row, in order; batching must not
        change it. Notes are small (hashes, sketches, numbers), for those of all rows are looked at together."""

    @abstractmethod
    def judge(self, notes: Sequence[pa.Table]) -> Judgement:
        """Verdicts from the notes of every part that has rows (memory-mapped; there may be none); the order of parts
        and rows decides nothing."""

    @abstractmethod
    def apply(self, table: pa.Table, verdicts: pa.Table) -> StepOutput:
        """Treat rows as their verdicts say: both tables run row by row."""


AnyStep = Step | GlobalStep


def dropped_rows(step: str, rows: pa.Table, reasons: pa.Array, details: pa.Array) -> pa.Table:
    """`rows` as DROPPED rows of `step`: `reasons` and `details` run parallel to them."""
    if not len(rows):  # as in most batches
        return no_rows(DROPPED)
    names = rows.schema.names
    columns = {
        "id": rows["id"] if "id" in names else pa.nulls(len(rows), pa.string()),
        "step": pa.repeat(step, len(rows)),
        "reason": reasons,
        "detail": details,
        **{name: rows[name] for name in ("source", "source_file", "source_row")},
        "row": rows["record"] if "record" in names else _as_json(rows),
    }
    return pa.table(columns, schema=DROPPED)


def _as_json(rows: pa.Table) -> pa.StringArray:
    """Each row as a JSON object: in columns, since to make Python's objects of many token ids takes long."""
    texts = pl.DataFrame(rows).select(pl.struct(pl.all()).struct.json_encode()).to_series()
    return texts.to_arrow().cast(pa.string())


def divide(step: str, table: pa.Table, reasons: pa.Array, details: pa.Array) -> tuple[pa.Table, pa.Table]:
    """Split `table` into rows without a reason (kept) and rows with one (dropped, as DROPPED)."""
    fails = pc.is_valid(reasons)
    kept = table.filter(pc.invert(fails))
    dropped = dropped_rows(step, table.filter(fails), reasons.filter(fails), details.filter(fails))
    return kept, dropped
