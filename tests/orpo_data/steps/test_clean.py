"""All rules together: which one names the reason, what is flagged, how settings are read, and the laws of a filter."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orpo_data.schema import JUDGED, PAIRS
from orpo_data.steps.clean import Clean
from orpo_data.steps.rules.rule import Rule

ROLES = {"S": "system", "U": "user", "A": "assistant"}


def dialogue(*turns: str) -> list[dict[str, str]]:
    """Messages from "U:text"."""
    return [{"role": ROLES[turn[0]], "content": turn[2:]} for turn in turns]


Q = dialogue("U:Q?")
YES, NO = dialogue("A:Yes."), dialogue("A:No.")

ALWAYS_DROP = ["empty_turn", "ends_with_human", "not_alternating", "diverges_early"]
SETTINGS = [name for name in Clean.model_fields if name not in ALWAYS_DROP]
THRESHOLDS: dict[str, dict[str, Any]] = {  # low enough for short texts to break them
    "low_margin": {"at_least": 1.0},
    "too_short": {"at_least": 3},
    "too_long": {"at_most": 60},
    "length_ratio": {"at_most": 10.0},
    "repetition": {"at_most": 0.3, "words_at_least": 5},
}


def clean(**actions: str) -> Clean:
    return Clean(**{name: {"action": action, **THRESHOLDS.get(name, {})} for name, action in actions.items()})


def reason(step: Clean, pair: dict[str, Any]) -> tuple[str, str] | None:
    """(reason, detail) of a dropped pair, None of a kept one."""
    out = step.apply(pa.Table.from_pylist([pair], schema=PAIRS))
    assert len(out.kept) + len(out.dropped) == 1
    if len(out.kept):
        return None
    (dropped,) = out.dropped.to_pylist()
    assert (dropped["id"], dropped["step"]) == (pair["id"], "clean")
    return dropped["reason"], dropped["detail"]


def flags(out: Any) -> list[list[tuple[str, str, float | None]]]:
    return [[(flag["rule"], flag["side"], flag["value"]) for flag in row] for row in out.kept["flags"].to_pylist()]


# --- hand-worked -----------------------------------------------------------------------------------------------------


def test_the_first_rule_that_fails_names_the_reason(make_pair: Callable[..., Any]) -> None:
    """A pair that breaks every rule loses one after the other."""
    two_users, scores = dialogue("U:Q?", "U:Q?"), {"score_chosen": 1, "score_rejected": 1}
    ends, open_end = dialogue("A:", "U:"), dialogue("A:B.", "U:C?")
    long = dialogue("A:B.", "U:C?", "A:D.")
    assert reason(Clean(), make_pair(two_users, ends, ends, **scores)) == ("empty_turn", "both")
    assert reason(Clean(), make_pair(two_users, open_end, open_end, **scores)) == ("ends_with_human", "both")
    assert reason(Clean(), make_pair(two_users, long, long, **scores)) == ("not_alternating", "both")
    assert reason(Clean(), make_pair(Q, long, long, **scores)) == ("diverges_early", "both")
    assert reason(Clean(), make_pair(Q, YES, YES, **scores)) == ("identical_pair", "both")
    assert reason(Clean(), make_pair(Q, YES, NO, **scores)) == ("tie", "both")
    assert reason(Clean(), make_pair(Q, YES, NO)) is None


def test_a_kept_pair_is_unaltered(make_pair: Callable[..., Any]) -> None:
    pair = make_pair(score_chosen=4.5, score_rejected=4.0, model_chosen="m", subset="s")
    (row,) = Clean().apply(pa.Table.from_pylist([pair], schema=PAIRS)).kept.to_pylist()
    assert row == {**pair, "flags": [], "label_noise": None}


def test_a_rule_that_flags_lets_a_later_one_drop(make_pair: Callable[..., Any]) -> None:
    pair = make_pair(Q, YES, YES, score_chosen=1, score_rejected=1)
    assert reason(Clean(identical_pair="flag"), pair) == ("tie", "both")
    out = Clean(identical_pair="flag", ties="flag").apply(pa.Table.from_pylist([pair], schema=PAIRS))
    assert flags(out) == [[("identical_pair", "both", None), ("tie", "both", None)]]


def test_all_that_is_found_in_a_pair(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("I am joe@mail.org", "I cannot help you. " * 4, "As an AI language model, I say: yes.")
    out = clean(refusal="flag", boilerplate="flag", personal_data="flag", repetition="flag", too_long="flag").apply(
        pa.Table.from_pylist([pair], schema=PAIRS)
    )
    assert flags(out) == [
        [
            ("too_long", "chosen", 76.0),
            ("repetition", "chosen", pytest.approx(1 - 4 / 14)),  # 16 words: 14 3-grams, 4 of them distinct
            ("refusal", "chosen", None),
            ("boilerplate", "rejected", None),
            ("personal_data", "prompt", 1.0),
        ]
    ]
    assert dict(out.flagged) == dict.fromkeys(["too_long", "repetition", "refusal", "boilerplate", "personal_data"], 1)


def test_flags_of_other_steps_and_of_rules_that_are_off_stay(make_pair: Callable[..., Any]) -> None:
    found = [{"rule": rule, "side": "both", "value": 0.5} for rule in ("near_duplicate", "too_short", "refusal")]
    row = make_pair(Q, YES, dialogue("A:I cannot help you.")) | {"flags": found, "label_noise": 0.25}
    out = Clean(refusal="flag").apply(pa.Table.from_pylist([row], schema=JUDGED))
    assert flags(out) == [
        [("refusal", "rejected", None), ("near_duplicate", "both", 0.5), ("too_short", "both", 0.5)],
    ]
    assert out.kept["label_noise"].to_pylist() == [0.25]
    assert dict(out.flagged) == {"refusal": 1}


# --- settings --------------------------------------------------------------------------------------------------------


def test_every_rule_is_listed_once_under_its_name() -> None:
    rules = [value for value in dict(Clean()).values() if isinstance(value, Rule)]
    assert [rule.name for rule in rules] == [{"ties": "tie"}.get(name, name) for name in Clean.model_fields]
    assert {rule.name for rule in rules if rule.action == "drop"} == {*ALWAYS_DROP, "identical_pair", "tie"}
    assert {rule.action for rule in rules} == {"drop", "off"}


@pytest.mark.parametrize("off", ["off", "keep", False, {"action": "off"}, {"action": False}])
def test_ties_kept(make_pair: Callable[..., Any], off: Any) -> None:
    """`keep` as older recipes have it, false as YAML reads `off`."""
    assert reason(Clean(ties=off), make_pair(score_chosen=1, score_rejected=1)) is None
    assert Clean(ties=off).model_dump()["ties"] == "off"


def test_settings_as_they_are_saved() -> None:
    """A bare action where there is nothing else to say: what a rule that is off would do is no reason to run again."""
    step = Clean(refusal="flag", too_short={"action": "off", "at_least": 5}, length_ratio="drop", language="flag")
    saved = step.model_dump(mode="json")
    assert saved["refusal"] == "flag"
    assert saved["too_short"] == "off"
    assert saved["length_ratio"] == {"action": "drop", "at_most": 20.0}
    assert saved["language"] == {"action": "flag", "keep": ["en"], "confidence": 0.8}
    assert Clean(**saved) == step.model_copy(update={"too_short": Clean().too_short})


@pytest.mark.parametrize(
    "settings", [{"refusal": "dorp"}, {"refusal": True}, {"refusal": 3}, {"refusals": "flag"}, {"ties": {"atmost": 2}}]
)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Clean(**settings)


# --- laws ------------------------------------------------------------------------------------------------------------

texts = st.sampled_from(
    [
        *(
            "",
            " ",
            "a",
            "A.",
            "Yes.",
            "yes!",
            "Human: no.\nAI: yes.",
            "no no no no no no no",
            "x" * 61,
            "I cannot help.",
        ),
        *("As an AI, I say yes.", "Mail joe@mail.org", "8.8.8.8", "a\u200b", "\u0000"),
    ]
)
roles = st.sampled_from(["system", "user", "assistant"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=3)
answers = texts.map(lambda text: [{"role": "assistant", "content": text}])
prompts = texts.map(lambda text: [{"role": "user", "content": text}]) | st.just(Q)
scores = st.sampled_from([None, 1.0, 1.5, 2.0])
pairs = st.tuples(prompts, answers, answers, scores, scores)
broken = st.tuples(messages, messages, messages, scores, scores)
rows = st.lists(pairs | pairs | broken, min_size=2, max_size=10)
steps = st.fixed_dictionaries(
    {name: st.sampled_from(["flag", "drop", "off"]) for name in SETTINGS if name != "language"}
).map(lambda actions: clean(**actions))


@pytest.fixture(scope="session")
def table_of(make_pair: Callable[..., Any]) -> Callable[[list[Any]], pa.Table]:
    def make(drawn: list[Any]) -> pa.Table:
        found = [
            make_pair(*sides, score_chosen=a, score_rejected=b, source_row=i) for i, (*sides, a, b) in enumerate(drawn)
        ]
        return pa.Table.from_pylist(found, schema=PAIRS)

    return make


@settings(max_examples=20)
@given(rows, steps)
def test_every_row_is_accounted_for(table_of: Callable[..., pa.Table], drawn: list[Any], step: Clean) -> None:
    table = table_of(drawn)
    out = step.apply(table)
    assert out.kept.schema == JUDGED
    assert sorted(out.kept["source_row"].to_pylist() + out.dropped["source_row"].to_pylist()) == list(range(len(table)))
    assert dict(out.flagged) == Counter(rule for row in flags(out) for rule in {flag[0] for flag in row})
    assert not {rule for row in flags(out) for rule, *_ in row} & {r.name for r in step.rules() if r.action == "drop"}
    for row in out.kept.to_pylist():
        assert [turn["role"] for turn in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
        assert row["prompt"][-1]["role"] == "user"


@settings(max_examples=20)
@given(rows, steps)
def test_cleaning_the_cleaned_changes_nothing(table_of: Callable[..., pa.Table], drawn: list[Any], step: Clean) -> None:
    once = step.apply(table_of(drawn))
    twice = step.apply(once.kept)
    assert twice.kept.equals(once.kept)
    assert len(twice.dropped) == 0
    assert twice.flagged == once.flagged


@settings(max_examples=20)
@given(rows, steps, st.randoms(use_true_random=False), st.integers(1, 4))
def test_neither_order_nor_batches_matter(
    table_of: Callable[..., pa.Table], drawn: list[Any], step: Clean, random: Any, batch: int
) -> None:
    table = table_of(drawn)
    whole = step.apply(table)
    order = random.sample(range(len(table)), len(table))
    parts = [step.apply(table.take(order[start : start + batch])) for start in range(0, len(table), batch)]
    for name in ("kept", "dropped"):
        together = pa.concat_tables(getattr(part, name) for part in parts)
        assert together.sort_by("source_row").equals(getattr(whole, name).sort_by("source_row"))
    assert sum((Counter(part.flagged) for part in parts), Counter()) == Counter(whole.flagged)


@settings(max_examples=20)
@given(rows)
def test_what_drops_a_row_would_have_flagged_it(table_of: Callable[..., pa.Table], drawn: list[Any]) -> None:
    """The reason is the first rule that finds something, and its side the one of the flag."""
    names = [name for name in SETTINGS if name != "language"]
    table = table_of(drawn)
    noted = clean(**dict.fromkeys(names, "flag")).apply(table)
    strict = clean(**dict.fromkeys(names, "drop")).apply(table)
    first = {
        row: found[0][:2]
        for row, found in zip(noted.kept["source_row"].to_pylist(), flags(noted), strict=True)
        if found
    }
    dropped = {
        row["source_row"]: (row["reason"], row["detail"].split(":")[0])
        for row in strict.dropped.to_pylist()
        if row["reason"] not in ALWAYS_DROP
    }
    assert dropped == first


def test_a_table_of_several_chunks(make_pair: Callable[..., Any]) -> None:
    """Empty chunks too: polars 2.1 fails on them in places."""
    german = "Der Abendhimmel ist rot, weil das Licht einen langen Weg durch die Luft hat."
    pairs = [make_pair("Q?", f"{i} " + german * (i % 2), "I cannot help.", source_row=i) for i in range(6)]
    whole = pa.Table.from_pylist(pairs, schema=PAIRS)
    chunked = pa.concat_tables([whole.slice(0, 0), whole.slice(0, 1), whole.slice(1, 0), whole.slice(1)])
    step = clean(**dict.fromkeys(SETTINGS, "flag"))
    assert step.apply(chunked).kept.equals(step.apply(whole).kept)
    assert step.apply(whole).flagged["language"] == 3


def plain(pair: dict[str, Any]) -> str | None:
    """The rules that are on by default, in plain Python."""
    prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
    blank = any(not turn["content"].strip() for turn in prompt + chosen + rejected)
    if blank or not chosen or not rejected:
        return "empty_turn"
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        return "ends_with_human"
    for side in (chosen, rejected):
        turns = [turn["role"] for turn in prompt + side]
        turns = turns[1:] if turns[0] == "system" else turns
        if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
            return "not_alternating"
    if len(chosen) > 1 or len(rejected) > 1:
        return "diverges_early"
    if chosen == rejected:
        return "identical_pair"
    return "tie" if pair["score_chosen"] is not None and pair["score_chosen"] == pair["score_rejected"] else None


@settings(max_examples=20)
@given(rows)
def test_agrees_with_plain_python(table_of: Callable[..., pa.Table], drawn: list[Any]) -> None:
    table = table_of(drawn)
    out = Clean().apply(table)
    expected = {i: reason for i, pair in enumerate(table.to_pylist()) if (reason := plain(pair))}
    assert dict(zip(out.dropped["source_row"].to_pylist(), out.dropped["reason"].to_pylist(), strict=True)) == expected
