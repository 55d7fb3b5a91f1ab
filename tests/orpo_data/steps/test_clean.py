"""One adversarial pair a reason, healthy pairs, and the laws of a filter."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import PAIRS
from orpo_data.steps.clean import RULES, Clean

ROLES = {"S": "system", "U": "user", "A": "assistant"}


def dialogue(*turns: str) -> list[dict[str, str]]:
    """Messages from "U:text"."""
    return [{"role": ROLES[turn[0]], "content": turn[2:]} for turn in turns]


def judge(pair: dict[str, Any], **config: Any) -> tuple[str, str] | None:
    """(reason, side) of a dropped pair, None of a kept one."""
    out = Clean(**config).apply(pa.Table.from_pylist([pair], schema=PAIRS))
    assert len(out.kept) + len(out.dropped) == 1
    if len(out.kept):
        assert out.kept.to_pylist() == [pair]
        return None
    (dropped,) = out.dropped.to_pylist()
    assert (dropped["id"], dropped["step"]) == (pair["id"], "clean")
    return dropped["reason"], dropped["detail"]


Q = dialogue("U:Q?")
YES, NO = dialogue("A:Yes."), dialogue("A:No.")

BROKEN = [
    ("empty_turn", "prompt", dialogue("U: \n\t"), YES, NO),
    ("empty_turn", "prompt", dialogue("U:Q?", "A:", "U:Q?"), YES, NO),
    ("empty_turn", "chosen", Q, dialogue("A:"), NO),
    ("empty_turn", "chosen", Q, dialogue("A:\u00a0\u2003"), NO),  # white space of other alphabets
    ("empty_turn", "rejected", Q, YES, dialogue("A: ")),
    ("empty_turn", "both", Q, dialogue("A:"), dialogue("A: ")),
    ("not_alternating", "both", [], YES, NO),
    ("diverges_early", "both", [], dialogue("U:Q?", "A:B."), dialogue("U:R?", "A:B.")),
    ("empty_turn", "chosen", Q, [], NO),
    ("empty_turn", "rejected", Q, YES, []),
    ("empty_turn", "chosen", Q, dialogue("A:Yes.", "U:", "A:Yes."), NO),
    ("ends_with_human", "chosen", Q, dialogue("U:Hm?"), NO),
    ("ends_with_human", "rejected", Q, YES, dialogue("A:No.", "U:Why?")),
    ("ends_with_human", "both", Q, dialogue("A:Yes.", "U:Sure?"), dialogue("A:No.", "U:Why?")),
    ("ends_with_human", "rejected", Q, YES, dialogue("S:No.")),
    ("not_alternating", "both", dialogue("A:Hello."), YES, NO),
    ("not_alternating", "both", dialogue("S:Be kind."), YES, NO),
    ("not_alternating", "both", dialogue("U:Q?", "U:Q?"), YES, NO),
    ("not_alternating", "both", dialogue("U:Q?", "A:Hm."), YES, NO),
    ("not_alternating", "both", dialogue("U:Q?", "S:Be kind."), YES, NO),
    ("not_alternating", "both", dialogue("S:One.", "S:Two.", "U:Q?"), YES, NO),
    ("not_alternating", "chosen", Q, dialogue("A:Yes.", "A:Really."), NO),
    ("not_alternating", "rejected", Q, YES, dialogue("A:No.", "A:Never.")),
    ("diverges_early", "chosen", Q, dialogue("A:B.", "U:C?", "A:D."), NO),
    ("diverges_early", "rejected", Q, YES, dialogue("A:B.", "U:C?", "A:D.")),
    ("diverges_early", "both", Q, dialogue("A:B.", "U:C?", "A:D."), dialogue("A:X.", "U:Y?", "A:Z.")),
    ("identical_pair", "both", Q, YES, YES),
]


@pytest.mark.parametrize(("reason", "side", "prompt", "chosen", "rejected"), BROKEN)
def test_rule(
    make_pair: Callable[..., Any], reason: str, side: str, prompt: list[Any], chosen: list[Any], rejected: list[Any]
) -> None:
    assert judge(make_pair(prompt, chosen, rejected)) == (reason, side)


def test_tie(make_pair: Callable[..., Any]) -> None:
    assert judge(make_pair(score_chosen=4.5, score_rejected=4.5)) == ("tie", "both")
    assert judge(make_pair(score_chosen=4.5, score_rejected=4.5), ties="keep") is None


HEALTHY = [
    (Q, YES, NO),
    (dialogue("S:Be kind.", "U:Q?"), YES, NO),
    (dialogue("U:A?", "A:B.", "U:C?"), YES, NO),
    (dialogue("S:Be kind.", "U:A?", "A:B.", "U:C?"), YES, NO),
    (Q, dialogue("A:Yes."), dialogue("A:Yes. ")),  # to the letter they differ
    (Q, dialogue("A:."), dialogue("A:0")),
]


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), HEALTHY)
def test_healthy_pairs_pass(
    make_pair: Callable[..., Any], prompt: list[Any], chosen: list[Any], rejected: list[Any]
) -> None:
    assert judge(make_pair(prompt, chosen, rejected)) is None


@pytest.mark.parametrize("scores", [(None, None), (4.0, None), (None, 4.0), (5.0, 4.0), (1.0, 4.0)])
def test_unequal_or_missing_scores_are_no_tie(make_pair: Callable[..., Any], scores: tuple[Any, Any]) -> None:
    assert judge(make_pair(score_chosen=scores[0], score_rejected=scores[1])) is None


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in BROKEN} | {"tie"} == set(RULES)


def test_the_first_rule_that_fails_names_the_reason(make_pair: Callable[..., Any]) -> None:
    """A pair that breaks every rule loses one after the other."""
    two_users = dialogue("U:Q?", "U:Q?")
    ends = dialogue("A:", "U:")
    assert judge(make_pair(two_users, ends, ends, score_chosen=1, score_rejected=1)) == ("empty_turn", "both")
    ends = dialogue("A:B.", "U:C?")
    assert judge(make_pair(two_users, ends, ends, score_chosen=1, score_rejected=1)) == ("ends_with_human", "both")
    long = dialogue("A:B.", "U:C?", "A:D.")
    assert judge(make_pair(two_users, long, long, score_chosen=1, score_rejected=1)) == ("not_alternating", "both")
    assert judge(make_pair(Q, long, long, score_chosen=1, score_rejected=1)) == ("diverges_early", "both")
    assert judge(make_pair(Q, YES, YES, score_chosen=1, score_rejected=1)) == ("identical_pair", "both")
    assert judge(make_pair(Q, YES, NO, score_chosen=1, score_rejected=1)) == ("tie", "both")


messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.sampled_from(["", " ", "a", "b"])}
    ),
    max_size=3,
)
sides = st.sampled_from([YES, NO]) | messages
score = st.sampled_from([None, 1.0, 2.0])


def broken_by_hand(pair: dict[str, Any]) -> str | None:
    """The same rules in plain Python."""
    prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
    blank = any(not turn["content"].strip() for turn in prompt + chosen + rejected)
    if blank or not chosen or not rejected:
        return "empty_turn"
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        return "ends_with_human"
    for side in (chosen, rejected):
        roles = [turn["role"] for turn in prompt + side]
        roles = roles[1:] if roles[0] == "system" else roles
        if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
            return "not_alternating"
    if len(chosen) > 1 or len(rejected) > 1:
        return "diverges_early"
    if chosen == rejected:
        return "identical_pair"
    return "tie" if pair["score_chosen"] is not None and pair["score_chosen"] == pair["score_rejected"] else None


@given(st.lists(st.tuples(st.just(Q) | messages, sides, sides, score, score), max_size=12), st.integers(1, 5))
def test_agrees_with_plain_python_in_any_batches(make_pair: Callable[..., Any], drawn: list[Any], batch: int) -> None:
    pairs = [
        make_pair(prompt, chosen, rejected, score_chosen=a, score_rejected=b, source_row=i)
        for i, (prompt, chosen, rejected, a, b) in enumerate(drawn)
    ]
    table = pa.Table.from_pylist(pairs, schema=PAIRS)
    whole = Clean().apply(table)
    expected = {i: broken_by_hand(pair) for i, pair in enumerate(pairs)}
    assert whole.kept["source_row"].to_pylist() == [i for i, reason in expected.items() if reason is None]
    assert dict(zip(whole.dropped["source_row"].to_pylist(), whole.dropped["reason"].to_pylist(), strict=True)) == {
        i: reason for i, reason in expected.items() if reason
    }
    parts = [Clean().apply(table.slice(start, batch)) for start in range(0, max(1, len(table)), batch)]
    assert pa.concat_tables(part.kept for part in parts).equals(whole.kept)
    assert pa.concat_tables(part.dropped for part in parts).equals(whole.dropped)
