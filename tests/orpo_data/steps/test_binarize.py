"""Both published rules, case by case, and the draw of the rejected answer."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import ASPECTS, PAIRS, RATED, pair_id
from orpo_data.steps.binarize import Binarize

MEAN, OVERALL = "mean-rating", "overall-score"


def completion(response: str, ratings: str = "----", score: float | None = None) -> dict[str, Any]:
    """`ratings` has a digit, or - for N/A, for each aspect."""
    aspects = {aspect: None if r == "-" else float(r) for aspect, r in zip(ASPECTS, ratings, strict=True)}
    return {
        "model": f"m-{response}",
        "response": response,
        "system_prompt": f"s-{response}",
        "overall_score": score,
    } | aspects


def rated(*completions: dict[str, Any], i: int = 0) -> dict[str, Any]:
    return {
        "id": f"row{i}",
        "prompt": [{"role": "user", "content": f"Question {i}?"}],
        "completions": list(completions),
        "subset": "flan",
        "source": "uf",
        "source_file": "flan.jsonl",
        "source_row": i,
    }


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=RATED)


def answers(row: dict[str, Any], **config: Any) -> tuple[str, str]:
    """Chosen and rejected text of a row that is kept."""
    out = Binarize(**config).apply(table(row))
    assert (len(out.kept), len(out.dropped)) == (1, 0)
    pair = out.kept.to_pylist()[0]
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


def rejected_over_seeds(row: dict[str, Any], **config: Any) -> set[str]:
    return {answers(row, seed=seed, **config)[1] for seed in range(60)}


def reason(row: dict[str, Any], **config: Any) -> str:
    out = Binarize(**config).apply(table(row))
    assert len(out.kept) == 0
    (dropped,) = out.dropped.to_pylist()
    assert dropped["step"] == "binarize"
    assert (dropped["id"], dropped["source_row"]) == (row["id"], row["source_row"])
    assert dropped["detail"]
    return str(dropped["reason"])


def test_mean_rating_takes_the_highest_mean_and_any_lower_one() -> None:
    # means 3, 4.5, 4, 1
    row = rated(completion("a", "3333"), completion("b", "4545"), completion("c", "4444"), completion("d", "1111"))
    assert answers(row, strategy=MEAN)[0] == "b"
    assert rejected_over_seeds(row, strategy=MEAN) == {"a", "c", "d"}


def test_mean_rating_skips_aspects_that_are_not_rated() -> None:
    # 5 alone beats (4 + 5) / 2; a missing rating counted as 0 would turn that round
    row = rated(completion("a", "45--"), completion("b", "-5--"))
    assert answers(row, strategy=MEAN) == ("b", "a")


def test_mean_rating_ignores_the_overall_score() -> None:
    row = rated(completion("a", "2222", score=10), completion("b", "3333", score=1))
    assert answers(row, strategy=MEAN) == ("b", "a")
    assert answers(row, strategy=OVERALL) == ("a", "b")


def test_an_answer_without_any_rating_is_neither_chosen_nor_rejected() -> None:
    row = rated(completion("a", "----", score=9), completion("b", "3333"), completion("c", "1111"))
    assert answers(row, strategy=MEAN)[0] == "b"
    assert rejected_over_seeds(row, strategy=MEAN) == {"c"}


@pytest.mark.parametrize("strategy", [MEAN, OVERALL])
def test_best_of_several_is_the_first_and_its_equals_are_not_rejected(strategy: str) -> None:
    row = rated(completion("a", "2222", 2), completion("b", "5555", 8), completion("c", "5555", 8))
    assert answers(row, strategy=strategy)[0] == "b"
    assert rejected_over_seeds(row, strategy=strategy) == {"a"}


@pytest.mark.parametrize("strategy", [MEAN, OVERALL])
def test_ties_kept_may_reject_an_equal(strategy: str) -> None:
    row = rated(completion("a", "2222", 2), completion("b", "5555", 8), completion("c", "5555", 8))
    assert answers(row, strategy=strategy, ties="keep")[0] == "b"
    assert rejected_over_seeds(row, strategy=strategy, ties="keep") == {"a", "c"}


@pytest.mark.parametrize("strategy", [MEAN, OVERALL])
def test_all_equal_is_a_tie(strategy: str) -> None:
    row = rated(completion("a", "4444", 7), completion("b", "4444", 7))
    assert reason(row, strategy=strategy) == "tie"
    assert answers(row, strategy=strategy, ties="keep") == ("a", "b")


def test_equal_means_of_different_aspects_tie() -> None:
    row = rated(completion("a", "54--"), completion("b", "4554"))  # both 4.5
    assert reason(row, strategy=MEAN) == "tie"


@pytest.mark.parametrize("completions", [[], [completion("a", "5555", 9)]])
def test_too_few_completions(completions: list[dict[str, Any]]) -> None:
    assert reason(rated(*completions)) == "too_few_completions"


@pytest.mark.parametrize("strategy", [MEAN, OVERALL])
def test_fewer_than_two_rated_answers(strategy: str) -> None:
    assert reason(rated(completion("a"), completion("b")), strategy=strategy) == "rating_missing"
    assert reason(rated(completion("a", "5555", 9), completion("b")), strategy=strategy) == "rating_missing"


def test_the_pair_carries_what_the_source_knew() -> None:
    row = rated(completion("a", "2221"), completion("b", "5555"), i=7)
    (pair,) = Binarize().apply(table(row)).kept.to_pylist()
    assert pair == {
        "id": pair_id(pair["prompt"], pair["chosen"], pair["rejected"]),
        "prompt": [{"role": "user", "content": "Question 7?"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "a"}],
        "score_chosen": 5.0,
        "score_rejected": 1.75,
        "model_chosen": "m-b",
        "model_rejected": "m-a",
        "system_chosen": "s-b",
        "system_rejected": "s-a",
        "subset": "flan",
        "source": "uf",
        "source_file": "flan.jsonl",
        "source_row": 7,
    }


def test_an_empty_table_stays_empty() -> None:
    out = Binarize().apply(RATED.empty_table())
    assert (len(out.kept), len(out.dropped)) == (0, 0)
    assert out.kept.schema == PAIRS


ratings = st.text("12345-", min_size=4, max_size=4)
scores = st.none() | st.integers(1, 10).map(float)
rows = st.lists(st.lists(st.tuples(ratings, scores), max_size=4), max_size=12).map(
    lambda groups: [
        rated(*(completion(f"{i}-{j}", *c) for j, c in enumerate(group)), i=i) for i, group in enumerate(groups)
    ]
)


@given(rows, st.sampled_from([MEAN, OVERALL]), st.sampled_from(["drop", "keep"]), st.integers(0, 9), st.data())
def test_neither_order_nor_batching_decides(
    rows: list[dict[str, Any]], strategy: str, ties: str, seed: int, data: st.DataObject
) -> None:
    step = Binarize(strategy=strategy, ties=ties, seed=seed)
    whole = step.apply(table(*rows))
    assert len(rows) == len(whole.kept) + len(whole.dropped)
    assert all(step.apply(table(row)).kept.to_pylist() in ([], [pair]) for row, pair in _matched(rows, whole.kept))
    shuffled = step.apply(table(*data.draw(st.permutations(rows))))
    for before, after in ((whole.kept, shuffled.kept), (whole.dropped, shuffled.dropped)):
        assert before.sort_by("source_row").equals(after.sort_by("source_row"))


def _matched(rows: list[dict[str, Any]], kept: pa.Table) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    by_row = {row["source_row"]: row for row in rows}
    return [(by_row[pair["source_row"]], pair) for pair in kept.to_pylist()]


def test_every_lower_answer_is_rejected_about_equally_often() -> None:
    several = [
        rated(completion("a", "5555"), completion("b", "1111"), completion("c", "2222"), i=i) for i in range(400)
    ]
    drawn = Binarize().apply(table(*several)).kept["rejected"].to_pylist()
    assert 150 < sum(side[0]["content"] == "b" for side in drawn) < 250
