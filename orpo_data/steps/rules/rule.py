"""What a rule is: its settings in the recipe, and what it finds wrong with a pair.

A rule looks at a table of pairs with the columns prompt, chosen, rejected (messages), score_chosen, score_rejected, and
prompt_text, chosen_text, rejected_text (the contents of the messages, joined by blank lines).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from orpo_data.schema import ANSWERS, SIDES

BOTH = ("both",)


class Rule(BaseModel, ABC):
    """A named rule that says yes or no. In a recipe a bare action is short for {action: ...}."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]  # the reason code of dropped rows, the rule's name in the flags of kept ones
    sides: ClassVar[tuple[str, ...]] = ANSWERS  # judged one by one; BOTH: the pair at once

    action: Literal["drop", "flag", "off"] = Field(
        default="off", description="What happens to a pair that breaks the rule; off: the rule is left out."
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_action(cls, value: Any) -> Any:
        """And false is short for off."""
        if isinstance(value, Rule):
            return value
        settings = value if isinstance(value, dict) else {"action": value}
        return {**settings, "action": "off"} if settings.get("action") is False else settings

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> Any:
        """The thresholds of a rule that is off decide nothing: they are no part of a dataset's fingerprint."""
        settings = handler(self)
        return self.action if self.action == "off" or len(settings) == 1 else settings

    @abstractmethod
    def measure(self, side: str) -> pl.Expr:
        """What the rule wants to know of a side in every row, whether it fails or a figure; null passes."""

    def fails(self, measured: pl.Expr) -> pl.Expr:
        """Whether a side fails by what was measured of it."""
        return measured

    def value(self, measured: pl.Expr) -> pl.Expr:
        """The figure that a flag records."""
        return pl.lit(None)

    def words(self, measured: pl.Expr) -> pl.Expr:
        """The figure as people read it."""
        return pl.lit(None, pl.String)

    @property
    def limit(self) -> str:
        """What follows the figure in a dropped row's detail: what was measured, and the threshold."""
        return ""


class Measured(Rule):
    """A rule with a threshold on a figure."""

    decimals: ClassVar[int] = 0

    def value(self, measured: pl.Expr) -> pl.Expr:
        return measured

    def words(self, measured: pl.Expr) -> pl.Expr:
        shown = measured.round(self.decimals) if self.decimals else measured
        return shown.cast(pl.String)


_TURN = pl.element().struct
_TEXTS = {f"{side}_text": pl.col(side).list.eval(_TURN.field("content")).list.join("\n\n") for side in SIDES}
_ROLES = {f"{side}_roles": pl.col(side).list.eval(_TURN.field("role") + ",").list.join("") for side in SIDES}


def rows_to_judge(table: pa.Table) -> pl.LazyFrame:
    """What rules look at of PAIRS or JUDGED rows; texts and roles are put together only if one of them asks for it."""
    frame = pl.from_arrow(table.select([*SIDES, "score_chosen", "score_rejected"]).combine_chunks())
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy().with_columns(**_TEXTS, **_ROLES)


def pair_texts(table: pa.Table) -> pl.DataFrame:
    """The rows to judge with their texts, for those who are no rules."""
    return rows_to_judge(table).drop(*_ROLES).collect()


def text(side: str) -> pl.Expr:
    """The text of a side of the pair."""
    return pl.col(f"{side}_text")


def quotient(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    """`part / whole` row by row. In an expression polars multiplies by the inverse of a column that holds one value
    only, whose last digit may be another: the same row would come to something else in another batch."""
    return pl.map_batches([part, whole], lambda columns: columns[0] / columns[1], pl.Float64(), is_elementwise=True)


def only_where(suspect: pl.Expr, measured: pl.Expr, inputs: Sequence[pl.Expr], dtype: pl.DataType) -> pl.Expr:
    """`measured` where `suspect` holds, both of them expressions over the columns `inputs`; null elsewhere.

    For figures that take long, where a quick look shows that most rows are beyond suspicion: these cost no more.
    """

    def measure(columns: Sequence[pl.Series]) -> pl.Series:
        rows = pl.DataFrame(columns)
        suspects = rows.select(suspect).to_series().fill_null(False)
        found = rows.filter(suspects).select(measured.cast(dtype)).to_series()
        place = pl.when(pl.lit(suspects)).then(pl.lit(suspects.cum_sum() - 1))
        return found.gather(pl.select(place).to_series())

    return pl.map_batches(inputs, measure, dtype, is_elementwise=True)
