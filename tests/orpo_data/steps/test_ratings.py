"""What an answer's score is under each strategy, by hand and against the published rules in plain arithmetic."""

from fractions import Fraction
from itertools import product
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import ASPECTS
from orpo_data.steps.binarize import Binarize
from orpo_data.steps.ratings import (
    REPAIRED,
    STRATEGIES,
    TRUSTED_ABOVE,
    Aspect,
    doubt,
    mean_rating,
    repaired_overall_score,
    weighted_aspects,
)


def answer(ratings: str, score: float | None = None) -> dict[str, Any]:
    """`ratings` has a digit, or - for N/A, for each aspect."""
    figures = [None if r == "-" else float(r) for r in ratings]
    return {"overall_score": score} | dict(zip(ASPECTS, figures, strict=True))


ALL_RATINGS = ["".join(digits) for digits in product("12345-", repeat=4)]


def test_the_recipe_offers_every_rule():
    offered = set(get_args(Binarize.model_fields["strategy"].annotation))
    assert offered == {*STRATEGIES, "weighted-aspects"}
    assert get_args(Aspect) == ASPECTS


@pytest.mark.parametrize(
    ("ratings", "mean"),
    [("1111", 1), ("5454", 4.5), ("554-", 14 / 3), ("4---", 4), ("---3", 3), ("----", None)],
)
def test_mean_rating_is_over_the_aspects_there_are(ratings, mean):
    assert mean_rating(answer(ratings, score=9)) == mean


@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_single_aspect(aspect):
    position = ASPECTS.index(aspect)
    ratings = "".join("5" if i == position else "1" for i in range(4))
    assert STRATEGIES[aspect](answer(ratings)) == 5
    assert STRATEGIES[aspect](answer(ratings.replace("5", "-"), score=9)) is None


@pytest.mark.parametrize(
    ("score", "ratings", "repaired"),
    [
        # a ten: the authors' limits are 2 and 4, both inclusive below
        (10, "1111", 1),
        (10, "2222", 1),
        (10, "3122", 1),  # 2
        (10, "3222", None),  # 2.25
        (10, "4444", None),
        (10, "4445", 10),  # 4.25
        (10, "5---", 10),
        (10, "2---", 1),
        (10, "----", None),
        # 8.0 and 7.5: a tenth of them where the ratings are as bad, sound from 3.25 on
        (8, "1111", 0.8),
        (8, "2222", 0.8),
        (8, "3333", None),
        (8, "333-", None),
        (8, "4333", 8),  # 3.25
        (8, "----", None),
        (7.5, "2111", 0.75),
        (7.5, "3222", None),  # 2.25
        (7.5, "3333", None),
        (7.5, "4333", 7.5),
        (7.5, "4455", 7.5),
        # every other score is what it is
        (9, "1111", 9),
        (7, "1111", 7),
        (8.5, "1111", 8.5),
        (1, "5555", 1),
        (0.8, "1111", 0.8),
        (5, "----", 5),
        (None, "5555", None),
    ],
)
def test_the_repair_by_hand(score, ratings, repaired):
    value = repaired_overall_score(answer(ratings, score))
    assert value == (None if repaired is None else pytest.approx(repaired))
    assert (doubt(answer(ratings, score)) is not None) == (repaired is None and score is not None)


def test_the_repair_of_a_ten_is_the_authors():
    """fix_overall_score_issue.py: <= 2 flips to 1, <= 4 is asked again, above it stays."""
    for ratings in ALL_RATINGS[:-1]:  # the last has no rating at all, on which the authors' script stops
        figures = [int(r) for r in ratings if r != "-"]
        mean = sum(figures) / len(figures)
        expected = 1 if mean <= 2 else None if mean <= 4 else 10
        assert repaired_overall_score(answer(ratings, 10)) == expected


@given(st.sampled_from(ALL_RATINGS), st.sampled_from([None, 0, 0.8, 1, 5, 6.5, 7, 7.5, 8, 8.5, 9, 10]))
def test_a_repair_keeps_divides_or_doubts_and_is_done_once(ratings, score):
    once = repaired_overall_score(answer(ratings, score))
    assert once in (score, None) or (score in TRUSTED_ABOVE and once == score / 10)
    assert once is None or repaired_overall_score(answer(ratings, once)) == once


@given(st.sampled_from(sorted(TRUSTED_ABOVE)), st.sampled_from(ALL_RATINGS), st.sampled_from(ALL_RATINGS))
def test_a_better_mean_never_repairs_to_less(score, a, b):
    worse, better = sorted((answer(r, score) for r in (a, b)), key=lambda rated: mean_rating(rated) or 0)
    repaired = [repaired_overall_score(worse), repaired_overall_score(better)]
    assert None in repaired or repaired[0] <= repaired[1]


def test_why_a_score_is_doubted():
    assert doubt(answer("3222", 10)) == "overall_score 10 with mean rating 2.25"
    assert doubt(answer("----", 7.5)) == "overall_score 7.5 with no rating"
    assert doubt(answer("4445", 10)) is doubt(answer("1111", 10)) is doubt(answer("5555")) is None


def test_weights_by_hand():
    rule = weighted_aspects({"helpfulness": 0.75, "truthfulness": 0.25})  # the last two aspects, the other way round
    assert rule(answer("1154")) == 0.75 * 4 + 0.25 * 5
    assert rule(answer("55-3")) == 3  # the weights of what is rated count as the whole
    assert rule(answer("55--")) is None


def test_equal_weighted_sums_tie_exactly():
    rule = weighted_aspects({"instruction_following": 0.1, "honesty": 0.2})  # 0.9 / 0.3
    assert rule(answer("14--")) == rule(answer("33--")) == 3
    assert 0.1 * 1 + 0.2 * 4 != 0.1 * 3 + 0.2 * 3
    rule = weighted_aspects({"instruction_following": 0.1, "honesty": 0.1, "truthfulness": 0.5})  # 1.2 / 0.7
    assert rule(answer("112-")) == rule(answer("251-")) == pytest.approx(12 / 7)
    tenth, half = Fraction(0.1), Fraction(0.5)  # exact, but a float is no tenth
    assert float((2 * tenth + 2 * half) / (2 * tenth + half)) != float((7 * tenth + half) / (2 * tenth + half))


@given(
    st.dictionaries(st.sampled_from(ASPECTS), st.integers(1, 20), min_size=1),
    st.text("12345", min_size=4, max_size=4),
    st.text("12345", min_size=4, max_size=4),
)
def test_weighted_scores_order_as_whole_numbers_do(tenths, a, b):
    rule = weighted_aspects({aspect: weight / 10 for aspect, weight in tenths.items()})
    sums = [sum(weight * answer(r)[aspect] for aspect, weight in tenths.items()) for r in (a, b)]
    scores = [rule(answer(r)) for r in (a, b)]
    assert (scores[0] < scores[1], scores[0] == scores[1]) == (sums[0] < sums[1], sums[0] == sums[1])
    assert scores[0] == pytest.approx(sums[0] / sum(tenths.values()))


@given(st.sampled_from(ALL_RATINGS), st.sampled_from([0.1, 1, 3]))
def test_equal_weights_are_the_mean_rating(ratings, weight):
    mean = mean_rating(answer(ratings))
    assert weighted_aspects(dict.fromkeys(ASPECTS, weight))(answer(ratings)) == mean


def test_every_strategy_but_the_repair_takes_a_figure_as_it_is():
    excellent = answer("1234", 10)
    scores = {name: rule(excellent) for name, rule in STRATEGIES.items()}
    assert scores == dict(zip(ASPECTS, (1, 2, 3, 4), strict=True)) | {
        "mean-rating": 2.5,
        "overall-score": 10,
        REPAIRED: None,
    }
