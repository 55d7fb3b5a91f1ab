"""Keeps a share or a number of a source's rows, so that several sources mix in the proportions of the recipe."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from orpo_data.errors import OrpoError
from orpo_data.steps.draws import Seed, draws, uniforms
from orpo_data.steps.notes import all_notes, for_parts, values
from orpo_data.steps.step import GlobalStep, Judgement, Step, StepOutput, divide

ORDER = ("id", "source_file", "source_row")  # of rows of equal content, which draw the same


class Sample(Step):
    """Keeps each row with probability `share`, drawn from (seed, row id)."""

    name: ClassVar[str] = "sample"
    version: ClassVar[int] = 2

    share: float = Field(gt=0, le=1, description="Share of the rows that is kept.")
    seed: Seed = Field(default=42, description="Seed of the draws.")

    def apply(self, table: pa.Table) -> StepOutput:
        return _keep(table, pa.array(uniforms(self.seed, "sample", pl.Series(table["id"])) < self.share))


class Take(GlobalStep):
    """Keeps exactly `count` rows, those with the smallest draws: more rows to choose from displace only some."""

    name: ClassVar[str] = "sample"
    version: ClassVar[int] = 2

    count: int = Field(ge=1, description="Number of rows that are kept.")
    seed: Seed = Field(default=42, description="Seed of the draws.")
    source: str = Field(description="Name of the source, for messages.")

    def note(self, table: pa.Table) -> pa.Table:
        drawn = draws(self.seed, "sample", pl.Series(table["id"]))
        return table.select(ORDER).append_column("draw", pa.array(drawn))

    def judge(self, notes: Sequence[pa.Table]) -> Judgement:
        """OrpoError if there are fewer rows than asked for."""
        rows = all_notes(self, notes)
        if len(rows) < self.count:
            raise OrpoError(f"source {self.source!r}: count asks for {self.count} pairs, there are {len(rows)}")
        drawn = values(rows, "draw")
        last = np.partition(drawn, self.count - 1)[self.count - 1]
        keep = drawn < last
        tied = np.flatnonzero(drawn == last)
        first = pc.sort_indices(rows.select(ORDER).take(tied), [(name, "ascending") for name in ORDER])
        keep[tied[first[: self.count - keep.sum()]]] = True
        return Judgement(for_parts(notes, pa.table({"keep": keep})))

    def apply(self, table: pa.Table, verdicts: pa.Table) -> StepOutput:
        return _keep(table, verdicts["keep"])


def _keep(table: pa.Table, keep: pa.Array | pa.ChunkedArray) -> StepOutput:
    reasons = pc.if_else(keep, pa.scalar(None, pa.string()), "not_sampled")
    return StepOutput(*divide("sample", table, reasons, pa.nulls(len(table), pa.string())))
