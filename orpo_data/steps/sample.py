"""Keeps a share of a source's rows, so that several sources mix in the proportions of the recipe."""

from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from orpo_data.steps.draws import uniform
from orpo_data.steps.step import Step, StepOutput, divide


class Sample(Step):
    """Keeps each row with probability `share`, drawn from (seed, row id)."""

    name: ClassVar[str] = "sample"
    version: ClassVar[int] = 1

    share: float = Field(gt=0, le=1, description="Share of the rows that is kept.")
    seed: int = Field(default=42, description="Seed of the draws.")

    def apply(self, table: pa.Table) -> StepOutput:
        out = [None if uniform(self.seed, "sample", i) < self.share else "not_sampled" for i in table["id"].to_pylist()]
        kept, dropped = divide(self.name, table, pa.array(out, pa.string()), pa.nulls(len(table), pa.string()))
        return StepOutput(kept, dropped)
