"""What a rule is: its settings in the recipe, and what it finds wrong with a pair.

A rule looks at a table of pairs with the columns prompt, chosen, rejected (messages), score_chosen, score_rejected, and
prompt_text, chosen_text, rejected_text (the contents of the messages, joined by blank lines).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

ANSWERS = ("chosen", "rejected")
SIDES = ("prompt", *ANSWERS)
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
        """Also where YAML has read `off` as the boolean false."""
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

    def judge(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """All that fails: row, rule, action, side, value, detail; of both answers the value is chosen's."""
        measured = pairs.select(**{side: self.measure(side) for side in self.sides}).with_row_index("row")
        failing = {side: self._failing(measured, side) for side in self.sides}
        if set(ANSWERS) <= failing.keys():
            answers = pl.concat([failing.pop(side) for side in ANSWERS])
            failing["answers"] = answers.group_by("row", maintain_order=True).agg(
                side=pl.when(pl.len() == 2).then(pl.lit("both")).otherwise(pl.first("side")),
                value=pl.first("value"),
                words=pl.col("words").str.join(" and "),
            )
        return pl.concat(failing.values()).select(
            "row",
            "side",
            "value",
            rule=pl.lit(self.name),
            action=pl.lit(self.action),
            detail=self._detail(pl.col("side"), pl.col("words")),
        )

    def _failing(self, measured: pl.DataFrame, side: str) -> pl.DataFrame:
        figure = pl.col(side)
        return measured.filter(self.fails(figure)).select(
            "row", side=pl.lit(side), value=self.value(figure).cast(pl.Float32), words=self.words(figure)
        )

    def _detail(self, side: pl.Expr, words: pl.Expr) -> pl.Expr:
        """`side: words limit`, or the side alone."""
        limit = f" {self.limit}" if self.limit else ""
        return pl.when(words != "").then(side + ": " + words + limit).otherwise(side)


class Measured(Rule):
    """A rule with a threshold on a figure."""

    decimals: ClassVar[int] = 0

    def value(self, measured: pl.Expr) -> pl.Expr:
        return measured

    def words(self, measured: pl.Expr) -> pl.Expr:
        shown = measured.round(self.decimals) if self.decimals else measured
        return shown.cast(pl.String)


def pair_texts(table: pa.Table) -> pl.DataFrame:
    """What rules look at of PAIRS or JUDGED rows."""
    frame = pl.from_arrow(table.select([*SIDES, "score_chosen", "score_rejected"]).combine_chunks())
    assert isinstance(frame, pl.DataFrame)
    contents = pl.element().struct.field("content")
    texts = {f"{side}_text": pl.col(side).list.eval(contents).list.join("\n\n") for side in SIDES}
    return frame.with_columns(**texts)


def text(side: str) -> pl.Expr:
    """The text of a side of the pair."""
    return pl.col(f"{side}_text")
