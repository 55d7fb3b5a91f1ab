"""Structural rules: what a preference pair must look like before anyone trains on it.

Each rule judges the pair and says which side failed; the first rule that fails names the reason. After this step
`chosen` and `rejected` are exactly one assistant message that answers the user's last turn.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import polars as pl
import pyarrow as pa
from pydantic import Field

from orpo_data.schema import PAIRS
from orpo_data.steps.step import Step, StepOutput, divide

Rule = Callable[[], pl.Expr]
"""Makes an expression over a PAIRS row: the name of the side that fails, or null."""

CONTENT = pl.element().struct.field("content")
ROLE = pl.element().struct.field("role")


def _failing_side(fails: Callable[[pl.Expr], pl.Expr], *sides: str) -> pl.Expr:
    """The first of `sides` for which `fails` holds, "both" when chosen and rejected fail alike."""
    expression = pl.lit(None, pl.String)
    for side in reversed(sides):
        expression = pl.when(fails(pl.col(side))).then(pl.lit(side)).otherwise(expression)
    both = fails(pl.col("chosen")) & fails(pl.col("rejected"))
    return pl.when(both).then(pl.lit("both")).otherwise(expression)


def empty_turn() -> pl.Expr:
    """A turn with no text but white space, or an answer with no turn at all."""
    blank = CONTENT.str.strip_chars() == ""

    def empty(side: pl.Expr) -> pl.Expr:
        # histories that differ from the first turn on have no common prompt: diverges_early says so
        no_turn = side.list.len() == 0 if side.meta.output_name() != "prompt" else pl.lit(False)
        return no_turn | side.list.eval(blank).list.any()

    return _failing_side(empty, "prompt", "chosen", "rejected")


def ends_with_human() -> pl.Expr:
    """The last turn is not the assistant's: there is no answer to prefer."""
    return _failing_side(lambda side: side.list.last().struct.field("role") != "assistant", "chosen", "rejected")


def not_alternating() -> pl.Expr:
    """After an optional system message, user and assistant must take turns, user first."""

    def broken(side: pl.Expr) -> pl.Expr:
        roles = pl.concat_list(pl.col("prompt"), side).list.eval(ROLE.filter(~((ROLE == "system") & _first())))
        expected = pl.when(_position() % 2 == 0).then(pl.lit("user")).otherwise(pl.lit("assistant"))
        return roles.list.eval(pl.element() != expected).list.any()

    return _failing_side(broken, "chosen", "rejected")


def _position() -> pl.Expr:
    return pl.int_range(pl.len())


def _first() -> pl.Expr:
    return _position() == 0


def diverges_early() -> pl.Expr:
    """The histories differ before the last turn, so the answers answer different prompts."""
    return _failing_side(lambda side: side.list.len() > 1, "chosen", "rejected")


def identical_pair() -> pl.Expr:
    """Both sides say the same, to the letter."""
    return pl.when(pl.col("chosen") == pl.col("rejected")).then(pl.lit("both"))


def tie() -> pl.Expr:
    """Both sides have the same score."""
    return pl.when(pl.col("score_chosen") == pl.col("score_rejected")).then(pl.lit("both"))


RULES: dict[str, Rule] = {
    "empty_turn": empty_turn,
    "ends_with_human": ends_with_human,
    "not_alternating": not_alternating,
    "diverges_early": diverges_early,
    "identical_pair": identical_pair,
    "tie": tie,
}

RuleName = Literal["empty_turn", "ends_with_human", "not_alternating", "diverges_early", "identical_pair", "tie"]


class Clean(Step):
    """Drops pairs that break a structural rule."""

    name: ClassVar[str] = "clean"
    version: ClassVar[int] = 1

    ties: Literal["drop", "keep"] = Field(default="drop", description="What happens to pairs with two equal scores.")

    def apply(self, table: pa.Table) -> StepOutput:
        rules = {reason: rule() for reason, rule in RULES.items() if reason != "tie" or self.ties == "drop"}
        frame = pl.from_arrow(table.select(["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]))
        assert isinstance(frame, pl.DataFrame)
        sides = frame.select(**rules)
        reason = pl.coalesce(pl.when(pl.col(name).is_not_null()).then(pl.lit(name)) for name in rules)
        judged = sides.select(reason=reason, side=pl.coalesce(*rules))
        kept, dropped = divide(
            self.name, table, judged["reason"].to_arrow().cast(pa.string()), judged["side"].to_arrow().cast(pa.string())
        )
        assert kept.schema.names == PAIRS.names
        return StepOutput(kept, dropped)
