"""Both published rules, row for row; every way to pick the rejected answer; the laws that hold for all settings."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orpo_data.schema import ASPECTS, PAIRS, RATED, pair_id
from orpo_data.steps.binarize import Binarize
from orpo_data.steps.draws import draw
from orpo_data.steps.picks import ROUNDING
from orpo_data.steps.ratings import REPAIRED, STRATEGIES, WEIGHTED, doubt, weighted_aspects

MEAN, OVERALL, MISSING = "mean-rating", "overall-score", "rating_missing"


def completion(response: str, ratings: str = "----", score: float | None = None, **fields: Any) -> dict[str, Any]:
    """`ratings` has a digit, or - for N/A, for each aspect."""
    aspects = {aspect: None if r == "-" else float(r) for aspect, r in zip(ASPECTS, ratings, strict=True)}
    named = {"model": f"m-{response}", "response": response, "system_prompt": f"s-{response}", "overall_score": score}
    return named | aspects | fields


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


def scored(*scores: float | None) -> dict[str, Any]:
    """Answers a, b, c, ... by their overall score."""
    return rated(*(completion(name, score=score) for name, score in zip("abcde", scores, strict=False)))


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=RATED)


def pairs(row: dict[str, Any], **config: Any) -> list[tuple[str, str]]:
    """Chosen and rejected text of each pair of a row that is kept."""
    out = Binarize(**config).apply(table(row))
    assert len(out.dropped) == 0
    assert out.expanded == len(out.kept) - 1
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in out.kept.to_pylist()]


def answers(row: dict[str, Any], **config: Any) -> tuple[str, str]:
    (pair,) = pairs(row, **config)
    return pair


def rejected_over_seeds(row: dict[str, Any], **config: Any) -> set[str]:
    return {answers(row, seed=seed, **config)[1] for seed in range(60)}


def drop(row: dict[str, Any], **config: Any) -> tuple[str, str]:
    """Reason and detail of a row that is dropped."""
    out = Binarize(**config).apply(table(row))
    assert (len(out.kept), out.expanded) == (0, 0)
    (dropped,) = out.dropped.to_pylist()
    assert (dropped["step"], dropped["id"], dropped["source_row"]) == ("binarize", row["id"], row["source_row"])
    return dropped["reason"], dropped["detail"]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_mean_rating_takes_the_highest_mean_and_any_lower_one() -> None:
    # means 3, 4.5, 4, 1
    row = rated(completion("a", "3333"), completion("b", "4545"), completion("c", "4444"), completion("d", "1111"))
    assert answers(row, strategy=MEAN)[0] == "b"
    assert rejected_over_seeds(row, strategy=MEAN) == {"a", "c", "d"}


def test_mean_rating_skips_aspects_that_are_not_rated() -> None:
    # 5 alone beats (4 + 5) / 2; a missing rating counted as 0 would turn that round
    row = rated(completion("a", "45--"), completion("b", "-5--"))
    assert answers(row, strategy=MEAN) == ("b", "a")


def test_the_strategies_disagree() -> None:
    row = rated(completion("a", "2225", score=10), completion("b", "3333", score=2), completion("c", "5111", score=1))
    assert answers(row, strategy=MEAN, rejected="lowest") == ("b", "c")
    assert answers(row, strategy=OVERALL, rejected="lowest") == ("a", "c")
    assert answers(row, strategy="instruction_following", rejected="lowest") == ("c", "a")
    assert answers(row, strategy="helpfulness", rejected="lowest") == ("a", "c")
    weights = {"helpfulness": 1.0, "instruction_following": 2.0}
    assert answers(row, strategy="weighted-aspects", weights=weights, rejected="lowest") == ("c", "a")


def test_an_answer_without_any_rating_is_neither_chosen_nor_rejected() -> None:
    row = rated(completion("a", "----", score=9), completion("b", "3333"), completion("c", "1111"))
    assert rejected_over_seeds(row, strategy=MEAN) == {"c"}


def test_equal_means_of_different_aspects_tie() -> None:
    row = rated(completion("a", "54--"), completion("b", "4554"))  # both 4.5
    assert drop(row, strategy=MEAN) == ("tie", "all answers have mean-rating 4.5")


def test_a_ten_that_was_a_one_is_no_longer_chosen() -> None:
    row = rated(completion("a", "1111", score=10), completion("b", "3333", score=6), completion("c", "2222", score=3))
    assert answers(row, strategy=OVERALL)[0] == "a"
    assert answers(row, strategy=REPAIRED, rejected="lowest") == ("b", "a")


def test_an_unknown_ten_is_left_out_of_its_prompt() -> None:
    row = rated(completion("a", "3333", score=10), completion("b", "3333", score=6), completion("c", "2222", score=3))
    assert rejected_over_seeds(row, strategy=REPAIRED) == {"c"}
    assert answers(row, strategy=REPAIRED)[0] == "b"


def test_too_few_left_when_doubtful_scores_go() -> None:
    row = rated(completion("a", "3333", score=10), completion("b", "3333", score=6), completion("c"))
    assert drop(row, strategy=REPAIRED) == (
        "suspicious_overall_score",
        "completions[0]: overall_score 10 with mean rating 3",
    )
    row = rated(completion("a", "3333", score=10), completion("b"), completion("c"))  # not enough either way
    assert drop(row, strategy=REPAIRED) == ("rating_missing", f"3 of 3 answers have no {REPAIRED}, at least 2 need it")


# --- which answer is rejected ----------------------------------------------------------------------------------------


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


def test_a_copy_of_the_chosen_answer_is_never_rejected() -> None:
    same = completion("a", score=8)
    row = rated(same, same, completion("b", score=8))
    assert rejected_over_seeds(row, strategy=OVERALL, ties="keep") == {"b"}
    assert drop(rated(same, same), strategy=OVERALL, ties="keep")[0] == "tie"
    other_model = completion("a", score=8, model="other")
    assert answers(rated(same, other_model), strategy=OVERALL, ties="keep") == ("a", "a")  # clean: identical_pair


@pytest.mark.parametrize(
    ("rejected", "ties", "expected"),
    [
        ("lowest", "drop", [("b", "d")]),
        ("next-best", "drop", [("b", "c")]),
        ("all", "drop", [("b", "c"), ("b", "d"), ("b", "e")]),
        ("lowest", "keep", [("b", "d")]),
        ("next-best", "keep", [("b", "a")]),
        ("all", "keep", [("b", x) for x in "acde"]),
    ],
)
def test_the_ways_to_reject(rejected: str, ties: str, expected: list[tuple[str, str]]) -> None:
    row = rated(*(completion(name, score=s) for name, s in zip("bacde", (8, 8, 5, 2, 2), strict=True)))
    assert pairs(row, strategy=OVERALL, rejected=rejected, ties=ties) == expected


@pytest.mark.parametrize(
    ("min_margin", "expected"),
    [(0, "bcd"), (0.5, "bcd"), (0.6, "cd"), (3, "cd"), (3.01, "d"), (7, "d")],
)
def test_only_answers_that_are_worse_by_the_margin(min_margin: float, expected: str) -> None:
    row = scored(8, 7.5, 5, 1)
    assert pairs(row, strategy=OVERALL, rejected="all", min_margin=min_margin) == [("a", name) for name in expected]
    assert rejected_over_seeds(row, strategy=OVERALL, min_margin=min_margin) == set(expected)
    assert answers(row, strategy=OVERALL, rejected="next-best", min_margin=min_margin) == ("a", expected[0])


def test_no_answer_is_worse_enough() -> None:
    detail = "overall-score: largest margin 3 (8 against 5), at least 3.5"
    assert drop(scored(8, 7.5, 5), strategy=OVERALL, min_margin=3.5) == ("low_margin", detail)
    assert drop(scored(8, 8), strategy=OVERALL, min_margin=3.5)[0] == "tie"


def test_a_margin_in_tenths_is_not_missed_by_rounding() -> None:
    assert answers(scored(8.3, 8.2), strategy=OVERALL, min_margin=0.1) == ("a", "b")  # 0.0999994 in float32
    assert drop(scored(8.3, 8.25), strategy=OVERALL, min_margin=0.1)[0] == "low_margin"


# --- what is not enough ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scores", "config"), [([], {}), ([9], {}), ([9, 8, 7], {"min_completions": 4})])
def test_too_few_completions(scores: list[float], config: dict[str, int]) -> None:
    least = config.get("min_completions", 2)
    assert drop(scored(*scores), **config) == ("too_few_completions", f"{len(scores)} of at least {least}")


@pytest.mark.parametrize("strategy", [MEAN, OVERALL])
def test_fewer_than_two_rated_answers(strategy: str) -> None:
    for rows in ((completion("a"), completion("b")), (completion("a", "5555", 9), completion("b"))):
        assert drop(rated(*rows), strategy=strategy)[0] == "rating_missing"


def test_more_scores_may_be_asked_for() -> None:
    detail = "1 of 4 answers have no overall-score, at least 4 need it"
    assert drop(scored(9, 8, None, 6), strategy=OVERALL, min_completions=4) == ("rating_missing", detail)
    assert answers(scored(9, 8, None, 6), strategy=OVERALL, min_completions=3, rejected="lowest") == ("a", "d")


def test_five_completions_are_as_good_as_four() -> None:
    assert rejected_over_seeds(scored(1, 2, 3, 4, 5), strategy=OVERALL) == set("abcd")


# --- the pair --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("mode", "chosen", "rejected", "message"),
    [
        ("column", "s", "s", None),
        ("chosen", "s", "t", "s"),
        ("chosen", "s", None, "s"),
        ("chosen", None, "t", None),
        ("chosen", "", "t", None),
        ("shared", "s", "s", "s"),
        ("shared", "s", "t", None),
        ("shared", None, None, None),
    ],
)
def test_system_prompts(mode: str, chosen: str | None, rejected: str | None, message: str | None) -> None:
    row = rated(completion("a", score=8, system_prompt=chosen), completion("b", score=2, system_prompt=rejected))
    (pair,) = Binarize(strategy=OVERALL, system_prompt=mode).apply(table(row)).kept.to_pylist()
    question = [{"role": "user", "content": "Question 0?"}]
    assert pair["prompt"] == ([{"role": "system", "content": message}] if message else []) + question
    assert (pair["system_chosen"], pair["system_rejected"]) == (chosen, rejected)
    assert pair["id"] == pair_id(pair["prompt"], pair["chosen"], pair["rejected"])


def test_a_system_message_of_the_prompt_stays_alone() -> None:
    row = scored(8, 2) | {"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]}
    (pair,) = Binarize(strategy=OVERALL, system_prompt="chosen").apply(table(row)).kept.to_pylist()
    assert pair["prompt"] == row["prompt"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"strategy": "weighted-aspects"}, "weights: strategy weighted-aspects needs them"),
        ({"weights": {"honesty": 1}}, "weights: only strategy weighted-aspects has them, it is mean-rating"),
        ({"strategy": "weighted-aspects", "weights": {"honesty": 0}}, "greater than 0"),
        ({"strategy": "weighted-aspects", "weights": {"honest": 1}}, "'honesty'"),
        ({"ties": "keep", "min_margin": 0.5}, "min_margin: 0.5 leaves no ties to keep"),
        ({"min_margin": float("nan")}, "min_margin"),
        ({"min_completions": 1}, "min_completions"),
        ({"strategy": "best"}, "strategy"),
    ],
)
def test_settings_that_do_not_fit(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Binarize(**config)


def test_an_empty_table_stays_empty() -> None:
    out = Binarize().apply(RATED.empty_table())
    assert (len(out.kept), len(out.dropped), out.expanded) == (0, 0, 0)
    assert out.kept.schema == PAIRS


def test_rows_with_the_same_id_are_rows_of_their_own() -> None:
    row = scored(8, 5, 2)
    out = Binarize(strategy=OVERALL).apply(table(row, row | {"source_row": 9}))
    first, second = out.kept.to_pylist()
    assert second == first | {"source_row": 9}


# --- laws ------------------------------------------------------------------------------------------------------------

ratings = st.text("12345-", min_size=4, max_size=4)
scores = st.none() | st.sampled_from([0, 0.8, 1, 2, 3.5, 5, 7.5, 8, 8.3, 10])
drawn_rows = st.lists(st.lists(st.tuples(ratings, scores), max_size=5), max_size=10).map(
    lambda groups: [
        rated(*(completion(f"{i}-{j}", *c) for j, c in enumerate(group)), i=i) for i, group in enumerate(groups)
    ]
)
configs = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(sorted(STRATEGIES)),
        "rejected": st.sampled_from(["random", "lowest", "next-best", "all"]),
        "min_completions": st.integers(2, 4),
        "system_prompt": st.sampled_from(["column", "chosen", "shared"]),
        "seed": st.integers(0, 9),
    }
)
thresholds = st.sampled_from([{}, {"ties": "keep"}, {"min_margin": 0.5}, {"min_margin": 2.0}])


def of_rows(part: pa.Table) -> list[dict[str, Any]]:
    """Rows by the prompt they came from, several of one prompt as they were written."""
    return sorted(part.to_pylist(), key=lambda row: row["source_row"])


@given(drawn_rows, configs, thresholds, st.data(), st.integers(1, 4))
def test_neither_order_nor_batching_decides(
    rows: list[dict[str, Any]], config: dict[str, Any], threshold: dict[str, Any], data: st.DataObject, size: int
) -> None:
    step = Binarize(**config, **threshold)
    whole = step.apply(table(*rows))
    assert len(rows) + whole.expanded == len(whole.kept) + len(whole.dropped)
    assert {row["source_row"] for row in (*whole.kept.to_pylist(), *whole.dropped.to_pylist())} == set(range(len(rows)))
    shuffled = table(*data.draw(st.permutations(rows)))
    parts = [step.apply(shuffled.slice(start, size)) for start in range(0, max(1, len(rows)), size)]
    assert of_rows(whole.kept) == of_rows(pa.concat_tables(part.kept for part in parts))
    assert of_rows(whole.dropped) == of_rows(pa.concat_tables(part.dropped for part in parts))


@given(drawn_rows, configs, thresholds)
def test_chosen_is_the_best_and_rejected_below_it_by_the_margin(
    rows: list[dict[str, Any]], config: dict[str, Any], threshold: dict[str, Any]
) -> None:
    rule = STRATEGIES[config["strategy"]]
    for pair in Binarize(**config, **threshold).apply(table(*rows)).kept.to_pylist():
        # read back from Arrow: the step sees float32
        (row,) = table(rows[pair["source_row"]]).to_pylist()
        by_text = {answer["response"]: rule(answer) for answer in row["completions"]}
        chosen, rejected = (by_text[pair[side][0]["content"]] for side in ("chosen", "rejected"))
        assert chosen == max(score for score in by_text.values() if score is not None)
        assert rejected is not None
        least = threshold.get("min_margin", 0)
        assert chosen - rejected >= least - 1e-5
        assert chosen > rejected or "ties" in threshold
        assert (pair["score_chosen"], pair["score_rejected"]) == (pytest.approx(chosen), pytest.approx(rejected))


hostile_answers = st.builds(
    completion,
    st.sampled_from("ab"),
    ratings,
    scores | st.sampled_from([-0.0, 8.2, 8.05]),
    model=st.sampled_from(["m", "n", None]),
    system_prompt=st.sampled_from(["s", "t", "", None]),
)
questions = st.sampled_from([[{"role": "user", "content": "q"}], [{"role": "system", "content": "own"}]])
hostile_rows = st.lists(
    st.builds(lambda answers, prompt: rated(*answers) | {"prompt": prompt}, st.lists(hostile_answers), questions)
).map(lambda rows: [row | {"id": str(i), "source_row": i} for i, row in enumerate(rows)])
weights = st.sampled_from([{}, {"strategy": WEIGHTED, "weights": {"honesty": 0.1, "helpfulness": 0.2}}])


def by_itself(step: Binarize, row: dict[str, Any]) -> list[dict[str, Any]] | str:
    """What one prompt comes to, in a loop over its answers: PAIRS rows, or the reason why there is none."""
    completions, rule = row["completions"], STRATEGIES.get(step.strategy) or weighted_aspects(step.weights)
    scores = {i: score for i, answer in enumerate(completions) if (score := rule(answer)) is not None}
    if len(completions) < step.min_completions:
        return "too_few_completions"
    if len(scores) < step.min_completions:
        doubted = sum(doubt(answer) is not None for answer in completions) if step.strategy == REPAIRED else 0
        return "suspicious_overall_score" if doubted and len(scores) + doubted >= step.min_completions else MISSING
    best = max(scores, key=lambda i: (scores[i], -i))
    same = {i for i in scores if all(completions[i][name] == completions[best][name] for name in ("response", "model"))}
    lower = [i for i in scores if scores[i] < scores[best] or (step.ties == "keep" and i not in same)]
    if not lower:
        return "tie"
    lower = [i for i in lower if scores[best] - scores[i] >= step.min_margin - ROUNDING]
    if not lower:
        return "low_margin"
    if step.rejected == "random":
        lower = [lower[draw(step.seed, "binarize", row["id"]) % len(lower)]]
    elif step.rejected != "all":
        lower = [(max if step.rejected == "next-best" else min)(lower, key=scores.__getitem__)]
    return [pair_of(step, row, scores, best, worse) for worse in lower]


def pair_of(step: Binarize, row: dict[str, Any], scores: dict[int, float], best: int, worse: int) -> dict[str, Any]:
    answers = {"chosen": row["completions"][best], "rejected": row["completions"][worse]}
    said = {side: [{"role": "assistant", "content": answer["response"]}] for side, answer in answers.items()}
    prompt, system = row["prompt"], answers["chosen"]["system_prompt"]
    wanted = {"column": False, "chosen": True, "shared": system == answers["rejected"]["system_prompt"]}
    if wanted[step.system_prompt] and system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    return {
        "id": pair_id(prompt, said["chosen"], said["rejected"]),
        "prompt": prompt,
        **said,
        "score_chosen": scores[best],
        "score_rejected": scores[worse],
        **{f"model_{side}": answer["model"] for side, answer in answers.items()},
        **{f"system_{side}": answer["system_prompt"] for side, answer in answers.items()},
        **{name: row[name] for name in ("subset", "source", "source_file", "source_row")},
    }


@given(hostile_rows, configs, thresholds, weights)
def test_many_rows_by_columns_are_each_row_by_itself(
    rows: list[dict[str, Any]], config: dict[str, Any], threshold: dict[str, Any], weighted: dict[str, Any]
) -> None:
    step, ingested = Binarize(**config | threshold | weighted), table(*rows)
    outcomes = [by_itself(step, row) for row in ingested.to_pylist()]
    output = step.apply(ingested)
    made = [pair for outcome in outcomes if isinstance(outcome, list) for pair in outcome]
    assert str(output.kept.to_pylist()) == str(pa.Table.from_pylist(made, schema=PAIRS).to_pylist())  # -0.0 is not 0.0
    drops = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert [row["reason"] for row in output.dropped.to_pylist()] == drops


def test_a_score_keeps_its_sign() -> None:
    pairs = Binarize(strategy=OVERALL).apply(table(scored(8, 0.0), scored(8, -0.0), scored(8, 0.0))).kept.to_pylist()
    assert [str(pair["score_rejected"]) for pair in pairs] == ["0.0", "-0.0", "0.0"]


def argilla(row: dict[str, Any]) -> tuple[str, set[str]] | None:
    """Their card in plain words: the best mean, and one with a lower mean at random; equal ratings are left out."""
    means = {}
    for answer in row["completions"]:
        figures = [answer[aspect] for aspect in ASPECTS if answer[aspect] is not None]
        if figures:
            means[answer["response"]] = sum(figures) / len(figures)
    lower = {name for name in means if means[name] < max(means.values())}
    return (max(means, key=lambda name: means[name]), lower) if lower else None


def h4(row: dict[str, Any]) -> tuple[str, set[str]] | None:
    """Their script in plain words: the best overall score, the first of several, and any other at random."""
    known = [answer for answer in row["completions"] if answer["overall_score"] is not None]
    if len(known) < 2:
        return None
    best = max(known, key=lambda answer: answer["overall_score"])
    return best["response"], {answer["response"] for answer in known if answer is not best}


@given(drawn_rows, st.sampled_from([(argilla, {"strategy": MEAN}), (h4, {"strategy": OVERALL, "ties": "keep"})]))
def test_the_published_rules_row_for_row(rows: list[dict[str, Any]], published: Any) -> None:
    rule, config = published
    expected = {row["source_row"]: rule(row) for row in rows}
    made = {pair["source_row"]: pair for pair in Binarize(**config).apply(table(*rows)).kept.to_pylist()}
    assert set(made) == {i for i, pair in expected.items() if pair}
    for i, pair in made.items():
        chosen, rejected = expected[i]
        assert pair["chosen"][0]["content"] == chosen
        assert pair["rejected"][0]["content"] in rejected
    every = Binarize(**config, rejected="all").apply(table(*rows)).kept.to_pylist()
    assert {(pair["source_row"], pair["rejected"][0]["content"]) for pair in every} == set(_all_of(expected))


def _all_of(expected: dict[int, tuple[str, set[str]] | None]) -> Iterator[tuple[int, str]]:
    for i, pair in expected.items():
        yield from ((i, name) for name in (pair[1] if pair else ()))


def test_every_lower_answer_is_rejected_about_equally_often() -> None:
    several = [
        rated(completion("a", "5555"), completion("b", "1111"), completion("c", "2222"), i=i) for i in range(400)
    ]
    drawn = Binarize().apply(table(*several)).kept["rejected"].to_pylist()
    assert 150 < sum(side[0]["content"] == "b" for side in drawn) < 250
