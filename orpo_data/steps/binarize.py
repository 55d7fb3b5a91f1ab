"""From several rated answers to pairs of a chosen and a rejected one."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field, model_validator

from orpo_data.schema import PAIRS, pair_ids
from orpo_data.sources.columns import Ints, Turns, to_arrow
from orpo_data.steps.draws import Seed
from orpo_data.steps.picks import Answers, Floats, picks
from orpo_data.steps.ratings import (
    FIGURES,
    REPAIRED,
    STRATEGIES,
    WEIGHTED,
    Aspect,
    Completion,
    ScoreRule,
    doubt,
    weighted_aspects,
)
from orpo_data.steps.step import Step, StepOutput, dropped_rows


class Drop(NamedTuple):
    """Why a prompt makes no pair."""

    reason: str
    detail: str


class Binarize(Step):
    """Chosen is the answer with the highest score, the first of several; rejected is picked among the lower ones.

    Two published sets come out row for row (their draws are not reproducible, so any of the answers they draw from):

    - `mean-rating` (argilla/ultrafeedback-binarized-preferences-cleaned): rejected is a random answer with a lower
      mean; prompts whose answers all tie are dropped.
    - `overall-score` with `ties: keep` (HuggingFaceH4/ultrafeedback_binarized): rejected is a random one of the others,
      even with the same score, unless it is the very answer of the same model. Where a prompt has fewer than two
      answers H4 writes the text "N/A" with a score of -100; here the prompt is dropped as too_few_completions.

    Both sets also leave out TruthfulQA, the subset and its questions elsewhere: that is the decontaminate step's work.
    """

    name: ClassVar[str] = "binarize"
    version: ClassVar[int] = 3

    strategy: Literal[
        "mean-rating",
        "overall-score",
        "overall-score-repaired",
        "instruction_following",
        "honesty",
        "truthfulness",
        "helpfulness",
        "weighted-aspects",
    ] = Field(
        default="mean-rating",
        description="Which figure of an answer counts as its score: argilla's mean rating, H4's overall_score, that "
        "with the authors' repair of the x10 defect (and of its 8.0 and 7.5), one aspect, or several with `weights`.",
    )
    weights: dict[Aspect, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default={}, description="Aspects and their weights, for `weighted-aspects`; one that is N/A is left out."
    )
    rejected: Literal["random", "lowest", "next-best", "all"] = Field(
        default="random",
        description="Among the lower answers: a random one, the lowest, the nearest to the chosen one, or each of them "
        "in a pair of its own.",
    )
    ties: Literal["drop", "keep"] = Field(
        default="drop",
        description="Whether an answer as good as the chosen one may be rejected (then set clean.ties alike).",
    )
    min_margin: float = Field(
        default=0, ge=0, allow_inf_nan=False, description="Least difference of two scores, in the strategy's own unit."
    )
    min_completions: int = Field(default=2, ge=2, description="Fewest answers with a score that a prompt must have.")
    system_prompt: Literal["column", "chosen", "shared"] = Field(
        default="column",
        description="Each answer's hidden system prompt stays in its column. `chosen` also makes that of the chosen "
        "answer the system message, though the rejected one never saw it; `shared` only where both saw the same.",
    )
    seed: Seed = Field(default=42, description="Seed of the draw; each row draws from (seed, row id).")

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.strategy == WEIGHTED and not self.weights:
            raise ValueError("weights: strategy weighted-aspects needs them, e.g. {helpfulness: 0.7, honesty: 0.3}")
        if self.strategy != WEIGHTED and self.weights:
            raise ValueError(f"weights: only strategy weighted-aspects has them, it is {self.strategy}")
        if self.ties == "keep" and self.min_margin:
            raise ValueError(f"min_margin: {self.min_margin:g} leaves no ties to keep; set ties to drop")
        return self

    def apply(self, table: pa.Table) -> StepOutput:
        """Pairs by columns; only of a prompt without any the row is looked at, to say why."""
        answers = Answers.of(table)
        scores = answers.scores(self._rule(), FIGURES[self.strategy])
        chosen, rejected = picks(self, answers, scores, table["id"])
        kept = self._table(table, answers, scores, chosen, rejected)
        losers = table.take(pa.array(np.setdiff1d(np.arange(len(table)), answers.row[chosen])))
        drops = [self._why_none(row) for row in losers.to_pylist()]
        reasons, details = (pa.array([drop[i] for drop in drops], pa.string()) for i in (0, 1))
        dropped = dropped_rows(self.name, losers, reasons, details)
        return StepOutput(kept, dropped, expanded=len(kept) + len(dropped) - len(table))

    def _table(self, table: pa.Table, answers: Answers, scores: Floats, best: Ints, worse: Ints) -> pa.Table:
        """A pair of the answers at each of the places `best` and `worse`."""
        rows = table.take(pa.array(answers.row[best]))
        chosen, rejected = answers.columns[best], answers.columns[worse]
        systems = chosen["system_prompt"], rejected["system_prompt"]
        sides = {
            "prompt": self._prompts(rows["prompt"].combine_chunks(), *systems),
            "chosen": Turns.every("assistant", chosen["response"]).to_arrow(),
            "rejected": Turns.every("assistant", rejected["response"]).to_arrow(),
        }
        columns = {
            "id": pair_ids(pl.DataFrame({name: pl.Series(side) for name, side in sides.items()})),
            **sides,
            "score_chosen": pa.array(scores[best]),
            "score_rejected": pa.array(scores[worse]),
            "model_chosen": to_arrow(chosen["model"]),
            "model_rejected": to_arrow(rejected["model"]),
            "system_chosen": to_arrow(systems[0]),
            "system_rejected": to_arrow(systems[1]),
            **{name: rows[name] for name in ("subset", "source", "source_file", "source_row")},
        }
        return pa.table(columns, schema=PAIRS)

    def _prompts(self, prompts: pa.ListArray, chosen: pl.Series, rejected: pl.Series) -> pa.ListArray:
        """With a system message, if one is wanted, there, and not brought by the prompt itself."""
        if self.system_prompt == "column":
            return prompts
        if self.system_prompt == "shared":
            chosen = chosen.set(chosen.ne_missing(rejected), None)
        return Turns.from_arrow(prompts).under(chosen).to_arrow()

    def _why_none(self, row: dict[str, Any]) -> Drop:
        """What a prompt that makes no pair lacks."""
        completions = row["completions"]
        if len(completions) < self.min_completions:
            return Drop("too_few_completions", f"{len(completions)} of at least {self.min_completions}")
        scores = [score for score in map(self._rule(), completions) if score is not None]
        if len(scores) < self.min_completions:
            return self._unscored(completions, len(scores))
        best, least = max(scores), min(scores)
        if best == least:
            return Drop("tie", f"all answers have {self.strategy} {best:g}")
        margin = f"{best - least:g} ({best:g} against {least:g})"
        return Drop("low_margin", f"{self.strategy}: largest margin {margin}, at least {self.min_margin:g}")

    def _rule(self) -> ScoreRule:
        return weighted_aspects(self.weights) if self.weights else STRATEGIES[self.strategy]

    def _unscored(self, completions: Sequence[Completion], scored: int) -> Drop:
        doubts = [f"completions[{i}]: {why}" for i, answer in enumerate(completions) if (why := doubt(answer))]
        if self.strategy == REPAIRED and scored + len(doubts) >= self.min_completions:
            return Drop("suspicious_overall_score", "; ".join(doubts))
        missing = f"{len(completions) - scored} of {len(completions)}"
        return Drop(
            "rating_missing", f"{missing} answers have no {self.strategy}, at least {self.min_completions} need it"
        )
