"""Rules on the shape of a pair and on its label: turns, roles, sameness, scores."""

from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field, field_validator, model_validator

from orpo_data.schema import SIDES
from orpo_data.steps.rules.folding import same_folded
from orpo_data.steps.rules.rule import BOTH, Measured, Rule, text

CONTENT = pl.element().struct.field("content")


class _Untrainable(Rule):
    """A rule whose breach leaves nothing to train on: no single answer to one prompt that a template can write."""

    action: Literal["drop"] = "drop"

    @field_validator("action", mode="before")
    @classmethod
    def _only_drop(cls, value: Any) -> Any:
        if value in ("flag", "off"):
            raise ValueError("can only be drop: nobody could train on a pair that breaks this rule")
        return value


class EmptyTurn(_Untrainable):
    """A turn with no text but white space, or an answer with no turn at all."""

    name: ClassVar[str] = "empty_turn"
    sides: ClassVar[tuple[str, ...]] = SIDES

    def measure(self, side: str) -> pl.Expr:
        # histories that differ from the first turn on have no common prompt: diverges_early says so
        no_turn = pl.lit(False) if side == "prompt" else pl.col(side).list.len() == 0
        return no_turn | pl.col(side).list.eval(CONTENT.str.strip_chars() == "").list.any()


class EndsWithHuman(_Untrainable):
    """The last turn is not the assistant's: there is no answer to prefer."""

    name: ClassVar[str] = "ends_with_human"

    def measure(self, side: str) -> pl.Expr:
        return pl.col(side).list.last().struct.field("role") != "assistant"


class NotAlternating(_Untrainable):
    """After an optional system message, user and assistant must take turns, user first."""

    name: ClassVar[str] = "not_alternating"

    def measure(self, side: str) -> pl.Expr:
        roles = pl.col("prompt_roles") + pl.col(f"{side}_roles")
        return ~roles.str.contains(r"^(?:system,)?(?:user,assistant,)*(?:user,)?$")


class DivergesEarly(_Untrainable):
    """The histories differ before the last turn, so the answers answer different prompts."""

    name: ClassVar[str] = "diverges_early"

    def measure(self, side: str) -> pl.Expr:
        return pl.col(side).list.len() > 1


class IdenticalPair(Rule):
    """Both sides say the same, to the letter."""

    name: ClassVar[str] = "identical_pair"
    sides: ClassVar[tuple[str, ...]] = BOTH

    action: Literal["drop", "flag", "off"] = "drop"

    def measure(self, side: str) -> pl.Expr:
        return pl.col("chosen") == pl.col("rejected")


class IdenticalAfterNormalisation(Rule):
    """Both sides say the same but for case, white space, punctuation and Unicode forms."""

    name: ClassVar[str] = "identical_after_normalisation"
    sides: ClassVar[tuple[str, ...]] = BOTH

    def measure(self, side: str) -> pl.Expr:
        return same_folded(text("chosen"), text("rejected"))


class Tie(Rule):
    """Both sides have the same score."""

    name: ClassVar[str] = "tie"
    sides: ClassVar[tuple[str, ...]] = BOTH

    action: Literal["drop", "flag", "off"] = "drop"

    @model_validator(mode="before")
    @classmethod
    def _keep(cls, value: Any) -> Any:
        """`keep` says the same as `off`."""
        return "off" if value == "keep" else value

    def measure(self, side: str) -> pl.Expr:
        return pl.col("score_chosen") == pl.col("score_rejected")


class LowMargin(Measured):
    """Chosen's score is not far enough above rejected's; by default only where it is below it."""

    name: ClassVar[str] = "low_margin"
    sides: ClassVar[tuple[str, ...]] = BOTH
    decimals: ClassVar[int] = 2

    at_least: float = Field(default=0.0, allow_inf_nan=False, description="Least margin, in the source's own unit.")

    @property
    def limit(self) -> str:
        return f"between the scores, at least {self.at_least:g}"

    def measure(self, side: str) -> pl.Expr:
        return pl.col("score_chosen") - pl.col("score_rejected")

    def fails(self, measured: pl.Expr) -> pl.Expr:
        return measured < self.at_least
