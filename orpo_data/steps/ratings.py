"""Which figure of a rated answer counts as its score: every rule by name, with whose rule it is."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from orpo_data.schema import ASPECTS

Completion = Mapping[str, Any]
"""One COMPLETION of schema.py."""

ScoreRule = Callable[[Completion], float | None]
"""The score of an answer, null where it has none."""

Aspect = Literal["instruction_following", "honesty", "truthfulness", "helpfulness"]

REPAIRED, WEIGHTED = "overall-score-repaired", "weighted-aspects"

TRUSTED_ABOVE = {10.0: 4.0, 8.0: 3.2, 7.5: 3.0}
"""Overall scores that the x10 defect is known to have made, and the mean rating above which each is believed.

A mark of 1 or less was multiplied by ten, so a 1 became 10, and a 0.8 or 0.75 became 8.0 or 7.5. Most 8.0 and 7.5 are
sound all the same (answers rated 4 on average have them), so the authors' limit for a 10, a mean of 4, shrinks with the
score: two fifths of it. A 9, 7 or 6 is left alone: marks of 0.9, 0.7 or 0.6 were never reported, and the two
annotations, made by different instructions, do disagree by so much.
"""

MISREAD_UP_TO = 2.0  # a mean rating up to this says that the mark was a tenth of the score


def mean_rating(completion: Completion) -> float | None:
    """Mean of the aspects that have a rating (argilla/ultrafeedback-binarized-preferences-cleaned)."""
    ratings = [completion[aspect] for aspect in ASPECTS if completion[aspect] is not None]
    return sum(ratings) / len(ratings) if ratings else None


def overall_score(completion: Completion) -> float | None:
    """The critic's single score, 1 to 10, as it is (HuggingFaceH4/ultrafeedback_binarized)."""
    score: float | None = completion["overall_score"]
    return score


def repaired_overall_score(completion: Completion) -> float | None:
    """The overall score without its x10 defect, null where one cannot tell.

    The authors' repair (OpenBMB/UltraFeedback, fix_overall_score_issue.py) looks at each score of 10: a mean rating up
    to 2 says it was a 1, above 4 it stays, between them they asked the critic again; here it is unknown. The same is
    done for 8.0 and 7.5, see TRUSTED_ABOVE. Without any rating there is nothing to check such a score against.
    """
    score: float | None = completion["overall_score"]
    if score not in TRUSTED_ABOVE:
        return score
    mean = mean_rating(completion)
    if mean is None or MISREAD_UP_TO < mean <= TRUSTED_ABOVE[score]:
        return None
    return score if mean > MISREAD_UP_TO else score / 10


def doubt(completion: Completion) -> str | None:
    """Why the overall score of an answer is unknown after the repair; null where it is not."""
    if completion["overall_score"] is None or repaired_overall_score(completion) is not None:
        return None
    mean = mean_rating(completion)
    return f"overall_score {completion['overall_score']:g} with " + (f"mean rating {mean:.3g}" if mean else "no rating")


def aspect_rating(aspect: str) -> ScoreRule:
    """The rating of one aspect, 1 to 5."""
    return lambda completion: completion[aspect]


def weighted_aspects(weights: Mapping[Aspect, float]) -> ScoreRule:
    """Weighted mean of the aspects that have a rating; exact in decimals, so that equal sums tie whatever the weights.

    Worked: weights 0.1 and 0.2 give ratings 1 and 4 the same 0.9 / 0.3 as ratings 3 and 3; floats make it a bit less.
    """
    exact = {aspect: Fraction(str(weight)) for aspect, weight in weights.items()}

    def score(completion: Completion) -> float | None:
        rated = [(weight, Fraction(completion[a])) for a, weight in exact.items() if completion[a] is not None]
        return float(sum(w * rating for w, rating in rated) / sum(w for w, _ in rated)) if rated else None

    return score


STRATEGIES: dict[str, ScoreRule] = {
    "mean-rating": mean_rating,
    "overall-score": overall_score,
    REPAIRED: repaired_overall_score,
    **{aspect: aspect_rating(aspect) for aspect in ASPECTS},
}

FIGURES: dict[str, Sequence[str]] = {
    "mean-rating": ASPECTS,
    "overall-score": ("overall_score",),
    REPAIRED: ("overall_score", *ASPECTS),
    **{aspect: (aspect,) for aspect in ASPECTS},
    WEIGHTED: ASPECTS,
}
"""The figures of an answer that a rule looks at: those who have the same ones have the same score."""
