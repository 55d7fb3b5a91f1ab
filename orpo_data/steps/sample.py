"""Keeps a share or a number of a source's rows, so that several sources mix in the proportions of the recipe."""

import heapq
from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from orpo_data.errors import OrpoError
from orpo_data.steps.draws import draw, uniform
from orpo_data.steps.step import GlobalStep, Step, StepOutput, divide

Place = tuple[int, str, str, int]
"""A row in the order in which rows are taken: its draw, then id, file and row for rows of equal content."""


class Sample(Step):
    """Keeps each row with probability `share`, drawn from (seed, row id)."""

    name: ClassVar[str] = "sample"
    version: ClassVar[int] = 1

    share: float = Field(gt=0, le=1, description="Share of the rows that is kept.")
    seed: int = Field(default=42, description="Seed of the draws.")

    def apply(self, table: pa.Table) -> StepOutput:
        return _keep(table, [uniform(self.seed, "sample", i) < self.share for i in table["id"].to_pylist()])


class Take(GlobalStep):
    """Keeps exactly `count` rows, those with the smallest draws: more rows to choose from displace only some."""

    name: ClassVar[str] = "sample"
    version: ClassVar[int] = 1

    count: int = Field(ge=1, description="Number of rows that are kept.")
    seed: int = Field(default=42, description="Seed of the draws.")
    source: str = Field(description="Name of the source, for messages.")

    def summarise(self, tables: Iterator[pa.Table]) -> Step:
        """OrpoError if there are fewer rows than asked for."""
        taken = heapq.nsmallest(self.count, (place for table in tables for place in places(table, self.seed)))
        if len(taken) < self.count:
            raise OrpoError(f"source {self.source!r}: count asks for {self.count} pairs, there are {len(taken)}")
        return UpTo(last=taken[-1], seed=self.seed)


class UpTo(Step):
    """The second pass of `Take`: keeps the rows up to a place."""

    name: ClassVar[str] = "sample"
    version: ClassVar[int] = 1

    last: Place
    seed: int

    def apply(self, table: pa.Table) -> StepOutput:
        return _keep(table, [place <= self.last for place in places(table, self.seed)])


def places(table: pa.Table, seed: int) -> Iterator[Place]:
    columns: list[list[Any]] = [table[name].to_pylist() for name in ("id", "source_file", "source_row")]
    return ((draw(seed, "sample", row_id), row_id, *origin) for row_id, *origin in zip(*columns, strict=True))


def _keep(table: pa.Table, keep: list[bool]) -> StepOutput:
    reasons = pa.array([None if kept else "not_sampled" for kept in keep], pa.string())
    return StepOutput(*divide("sample", table, reasons, pa.nulls(len(table), pa.string())))
