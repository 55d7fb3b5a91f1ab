"""The formula on hand-worked groups of pairs, and its laws: a score for every row, in 0..1, whatever the order."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orpo_data.schema import JUDGED, PAIRS
from orpo_data.steps.clean import Clean
from orpo_data.steps.label_noise import LabelNoise, Weights
from orpo_data.steps.step import Judgement

FAR, NEAR = "It grows towards the window.", "Nobody can know such things."
THIRD, FOURTH = "Ask the gardener about them.", "Plants love warmth and rain."


@pytest.fixture(scope="session")
def judged(make_pair):
    """A JUDGED table of (prompt, chosen, rejected, columns)."""

    def make(*rows: tuple[Any, ...]) -> pa.Table:
        pairs = [
            make_pair(*row[:3], **{"source_row": i, **(row[3] if len(row) > 3 else {})}) for i, row in enumerate(rows)
        ]
        return Clean(identical_pair="off", ties="off").apply(pa.Table.from_pylist(pairs, schema=PAIRS)).kept

    return make


@pytest.fixture(scope="session")
def score(run_global):
    """The scores of a table's rows."""

    def score(table: pa.Table, **config: Any) -> list[float]:
        out = run_global(LabelNoise(**config), [table])
        assert len(out.dropped) == 0
        assert out.kept.drop_columns(["label_noise", "flags"]).equals(table.drop_columns(["label_noise", "flags"]))
        return [round(value, 4) for value in out.kept["label_noise"].to_pylist()]

    return score


def test_nothing_suspicious(score, judged):
    assert score(judged(("Why?", FAR, NEAR), ("How?", NEAR, THIRD))) == [0, 0]


def test_a_contradiction_is_a_toss_of_a_coin(score, judged):
    assert score(judged(("Why?", FAR, NEAR), ("Why?", NEAR, FAR))) == [0.5, 0.5]


def test_the_minority_is_the_more_likely_wrong(score, judged):
    votes = [("Why?", FAR, NEAR)] * 3 + [("why", NEAR.upper(), FAR)]
    assert score(judged(*votes)) == [0.25, 0.25, 0.25, 0.75]
    assert score(judged(*votes), weights={"contradiction": 0.4}) == [0.1, 0.1, 0.1, 0.3]


def test_nearly_the_same_prompt(score, judged):
    """Of 10 and 11 runs of three words they share 10."""
    prompt = "Please explain to me in some detail why the fern grows there"
    table = judged((prompt, FAR, NEAR), (prompt + " today", NEAR, FAR), ("Another question altogether?", NEAR, FAR))
    assert score(table) == [0.5, 0.5, 0]
    assert score(table, near=0.95) == [0, 0, 0]
    assert score(table, near=None) == [0, 0, 0]


def test_an_answer_that_loses_elsewhere(score, judged):
    """FAR beats NEAR and THIRD and loses to FOURTH: of the votes of other pairs on FAR > NEAR one of two is against."""
    assert score(judged(("Why?", FAR, NEAR), ("Why?", FOURTH, FAR))) == [0.3, 0.3]
    assert score(judged(("Why?", FAR, NEAR), ("Why?", FOURTH, FAR), ("Why?", FAR, THIRD))) == [0.15, 0.3, 0.15]
    assert score(judged(("Why?", FAR, NEAR), ("Why?", FAR, THIRD))) == [0, 0]  # FAR wins wherever it stands
    assert score(judged(("Why?", FAR, NEAR), ("How?", FOURTH, FAR))) == [0, 0]  # on another prompt it says nothing
    assert score(judged(("Why?", FAR, NEAR), ("Why?", FAR, FAR))) == [0, 0.5]  # nor does one answer beside itself


def test_margins_against_the_median_of_their_source(score, judged):
    def row(source: str, margin: float | None) -> tuple[Any, ...]:
        scores = {"score_chosen": None if margin is None else 5 + margin, "score_rejected": 5.0}
        return f"Why {source} {margin}?", FAR, NEAR, {"source": source, **scores}

    table = judged(*(row("a", margin) for margin in (1, 2, 3, -4, 2)), row("b", 10), row("b", 5), row("b", None))
    # medians 2 and 7.5
    assert score(table) == [0.15, 0, 0, 0.3, 0, 0, round(0.3 / 3, 4), 0]


def test_a_clear_pair_among_inverted_ones(score, judged):
    scores = ({"score_chosen": 5.0 + margin, "score_rejected": 5.0} for margin in (-3, -2, -1, 5))
    assert score(judged(*((f"Why {i}?", FAR, NEAR, own) for i, own in enumerate(scores)))) == [0.3, 0.3, 0.3, 0]


def test_a_tie_where_all_are_ties(score, judged):
    assert score(judged(("Why?", FAR, NEAR, {"score_chosen": 1.0, "score_rejected": 1.0}))) == [0.3]


def test_a_refusal_preferred_to_an_answer(score, judged):
    no, sorry = "I cannot help you with this.", "I'm sorry, but I can't assist."
    table = judged(("Why?", no, FAR), ("How?", FAR, no), ("What?", no, sorry), ("Who?", FAR, NEAR))
    assert score(table) == [0.3, 0, 0, 0]
    assert score(table, weights={"refusal": 0}) == [0, 0, 0, 0]


def test_answers_alike(score, judged):
    """The same words; 3 of 4 shared; 1 of 2 shared."""
    table = judged(
        ("Why?", "Yes, it is.", "yes it is"),
        ("How?", "a b c d", "a b c"),
        ("What?", "a b c", "a b d"),
        ("Who?", "!", "?"),
    )
    assert score(table) == [0.5, 0.25, 0, 0]


def test_a_short_answer_preferred(score, judged):
    """Chosen has 1/4, 1/2, all and twice the characters of rejected."""
    table = judged(("a", "x" * 4, "y" * 16), ("b", "x" * 8, "y" * 16), ("c", "x", "y"), ("d", "x" * 20, "y" * 10))
    assert score(table) == [0.15, 0, 0, 0]


def test_signals_add_up_as_chances(score, judged):
    """A refusal with a score below the other's: 1 - 0.7 * 0.7."""
    scores = {"score_chosen": 1.0, "score_rejected": 2.0}
    table = judged(("Why?", "I cannot help you with this.", FAR, scores))
    assert score(table) == [0.51]
    assert score(table, weights={"refusal": 1}) == [1.0]
    assert score(table, weights=dict.fromkeys(Weights.model_fields, 0)) == [0]


def test_flags_above_a_threshold(run_global, judged):
    table = judged(("Why?", FAR, NEAR), ("Why?", NEAR, FAR), ("How?", FAR, NEAR))
    out = run_global(LabelNoise(flag_above=0.4), [table])
    flag = {"rule": "label_noise", "side": "both", "value": 0.5}
    assert out.kept["flags"].to_pylist() == [[flag], [flag], []]
    assert out.flagged == {"label_noise": 2}
    assert run_global(LabelNoise(flag_above=0.5), [table]).flagged == {}


def test_facts(run_global, judged):
    table = judged(("Why?", FAR, NEAR), ("why", NEAR, FAR), ("How?", FAR, NEAR), ("Same?", FAR, FAR))
    facts = run_global(LabelNoise(), [table]).facts
    assert facts == {"prompts_with_several_pairs": 1, "contradicted_pairs": 2}


def test_no_rows_at_all(run_global):
    assert LabelNoise().judge([]) == Judgement([], {"prompts_with_several_pairs": 0, "contradicted_pairs": 0})
    assert run_global(LabelNoise(), [JUDGED.empty_table()]).kept.equals(JUDGED.empty_table())


@pytest.mark.parametrize(
    "config", [{"weights": {"margin": 2}}, {"weights": {"marign": 1}}, {"near": 0.1}, {"flag_above": 2}]
)
def test_wrong_settings(config):
    with pytest.raises(ValidationError):
        LabelNoise(**config)


answers = st.sampled_from([FAR, NEAR, THIRD, "I cannot help you with this.", "yes", "Yes!", "!", "a " * 30])
prompts = st.sampled_from(
    ["Why?", "why", "How does it grow in the shade of a wall?", "How does it grow in the shade of a wall"]
)
scores = st.sampled_from([None, 1.0, 2.0, 5.0])
rows = st.lists(st.tuples(prompts, answers, answers, scores, scores, st.sampled_from("ab")), min_size=1, max_size=8)


@settings(max_examples=20)
@given(rows, st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 5), st.sampled_from([None, 0.3]))
def test_laws(run_global, judged, drawn, random, batch, part, flag_above):
    """In 0..1 for each row; neither order nor batches matter; a second time nothing changes."""
    step = LabelNoise(flag_above=flag_above)
    table = judged(*((p, c, r, {"score_chosen": x, "score_rejected": y, "source": s}) for p, c, r, x, y, s in drawn))
    whole = run_global(step, [table])
    assert all(0 <= value <= 1 for value in whole.kept["label_noise"].to_pylist())
    shuffled = table.take(random.sample(range(len(table)), len(table)))
    again = run_global(step, [shuffled.slice(start, part) for start in range(0, len(table), part)], batch)
    assert again.kept.sort_by("source_row").equals(whole.kept)
    assert (again.facts, again.flagged) == (whole.facts, whole.flagged)
    assert run_global(step, [whole.kept]).kept.equals(whole.kept)


@settings(max_examples=20)
@given(rows)
def test_a_contradiction_never_lowers_a_score(score, judged, drawn):
    """One more row that prefers NEAR to FAR: only rows that prefer it too may gain by it."""
    before = judged(*((p, c, r) for p, c, r, *_ in drawn), ("Why?", FAR, NEAR))
    after = judged(*((p, c, r) for p, c, r, *_ in drawn), ("Why?", FAR, NEAR), ("Why?", NEAR, FAR))
    others = [(c, r) != (NEAR, FAR) for _, c, r, *_ in drawn] + [True]
    weights = {"disagreement": 0}
    scores = zip(others, score(before, weights=weights), score(after, weights=weights), strict=False)
    assert all(old <= new for other, old, new in scores if other)
