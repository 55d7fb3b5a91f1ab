"""From several rated answers to one chosen and one rejected."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from orpo_data.schema import ASPECTS, PAIRS, pair_id
from orpo_data.steps.draws import draw
from orpo_data.steps.step import Step, StepOutput, dropped_rows

Completion = dict[str, Any]


def mean_rating(completion: Completion) -> float | None:
    """Mean of the aspects that have a rating; null when none has (argilla's cleaned set)."""
    ratings = [completion[aspect] for aspect in ASPECTS if completion[aspect] is not None]
    return sum(ratings) / len(ratings) if ratings else None


def overall_score(completion: Completion) -> float | None:
    """The annotator's single score, 1 to 10 (HuggingFaceH4's set)."""
    score: float | None = completion["overall_score"]
    return score


STRATEGIES: dict[str, Callable[[Completion], float | None]] = {
    "mean-rating": mean_rating,
    "overall-score": overall_score,
}


class Binarize(Step):
    """Chosen is the best rated answer, the first of several; rejected is drawn among the others.

    mean-rating reproduces argilla/ultrafeedback-binarized-preferences-cleaned: chosen has the highest mean rating over
    the four aspects, rejected is a random answer with a lower mean, prompts whose answers all tie are dropped.
    overall-score with `ties: keep` reproduces HuggingFaceH4/ultrafeedback_binarized: chosen has the highest
    overall_score, rejected is a random one of the others, even one with the same score.
    """

    name: ClassVar[str] = "binarize"
    version: ClassVar[int] = 1

    strategy: Literal["mean-rating", "overall-score"] = Field(
        default="mean-rating", description="Which figure of an answer counts as its score."
    )
    rejected: Literal["random"] = Field(default="random", description="How the rejected answer is picked.")
    ties: Literal["drop", "keep"] = Field(
        default="drop", description="Whether an answer as good as the chosen one may be rejected."
    )
    seed: int = Field(default=42, description="Seed of the draw; each row draws from (seed, row id).")

    def apply(self, table: pa.Table) -> StepOutput:
        pairs, failed, reasons, details = [], [], [], []
        for index, row in enumerate(table.to_pylist()):
            outcome = self._pair(row)
            if isinstance(outcome, dict):
                pairs.append(outcome)
            else:
                failed.append(index)
                reasons.append(outcome[0])
                details.append(outcome[1])
        losers = table.take(pa.array(failed, pa.int64()))
        dropped = dropped_rows(self.name, losers, pa.array(reasons, pa.string()), pa.array(details, pa.string()))
        return StepOutput(pa.Table.from_pylist(pairs, schema=PAIRS), dropped)

    def _pair(self, row: dict[str, Any]) -> dict[str, Any] | tuple[str, str]:
        """The PAIRS row, or (reason, detail)."""
        completions = row["completions"]
        if len(completions) < 2:
            return "too_few_completions", f"{len(completions)} of at least 2"
        scores = [STRATEGIES[self.strategy](completion) for completion in completions]
        rated = [(score, i) for i, score in enumerate(scores) if score is not None]
        if len(rated) < 2:
            return "rating_missing", f"{len(rated)} of {len(completions)} answers have a {self.strategy}"
        best_score, best = max(rated, key=lambda item: (item[0], -item[1]))
        others = [i for score, i in rated if i != best and (self.ties == "keep" or score < best_score)]
        if not others:
            return "tie", f"all answers have {self.strategy} {best_score:g}"
        worse = others[draw(self.seed, "binarize", row["id"]) % len(others)]
        return _pair_row(row, completions[best], completions[worse], best_score, scores[worse])


def _pair_row(
    row: dict[str, Any], chosen: Completion, rejected: Completion, score_chosen: float, score_rejected: float | None
) -> dict[str, Any]:
    prompt = row["prompt"]
    chosen_turns = [{"role": "assistant", "content": chosen["response"]}]
    rejected_turns = [{"role": "assistant", "content": rejected["response"]}]
    return {
        "id": pair_id(prompt, chosen_turns, rejected_turns),
        "prompt": prompt,
        "chosen": chosen_turns,
        "rejected": rejected_turns,
        "score_chosen": score_chosen,
        "score_rejected": score_rejected,
        "model_chosen": chosen["model"],
        "model_rejected": rejected["model"],
        "system_chosen": chosen["system_prompt"],
        "system_rejected": rejected["system_prompt"],
        **{name: row[name] for name in ("subset", "source", "source_file", "source_row")},
    }
