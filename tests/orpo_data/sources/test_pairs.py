"""Anyone's pairs, in every form that is accepted."""

import gzip
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import ORIGIN, PAIRS
from orpo_data.sources.pairs import COLUMNS, parse
from orpo_data.sources.record import MissingColumn, Unparsable

REAL = Path(__file__).parents[4] / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real pairs of ../shared/data are not here")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(role: str, content: str) -> dict[str, str]:
    return {"from": role, "value": content}


Q, YES, NO = turn("user", "q"), turn("assistant", "yes"), turn("assistant", "no")
HISTORY = [Q, turn("assistant", "a"), turn("user", "r")]
STRINGS = {"prompt": "q", "chosen": "yes", "rejected": "no"}

FORMS = {
    "strings": (STRINGS, [Q]),
    "messages": ({"prompt": [Q], "chosen": [YES], "rejected": [NO]}, [Q]),
    "single messages": ({"prompt": Q, "chosen": YES, "rejected": NO}, [Q]),
    "string prompt, messages": ({"prompt": "q", "chosen": [YES], "rejected": [NO]}, [Q]),
    "whole conversations beside a prompt": ({"prompt": "other", "chosen": [Q, YES], "rejected": [Q, NO]}, [Q]),
    "implicit prompt": ({"chosen": [*HISTORY, YES], "rejected": [*HISTORY, NO]}, HISTORY),
    "implicit prompt, null column": ({"prompt": None, "chosen": [Q, YES], "rejected": [Q, NO]}, [Q]),
    "system message in the conversations": (
        {"chosen": [turn("system", "s"), Q, YES], "rejected": [turn("system", "s"), Q, NO]},
        [turn("system", "s"), Q],
    ),
    "ShareGPT": (
        {
            "conversations": [said("human", "q"), said("gpt", "a"), said("Human", "r")],
            "chosen": said("chatgpt", "yes"),
            "rejected": said("bing", "no"),
        },
        HISTORY,
    ),
    "ShareGPT with a system column": (
        {"system": "s", "conversations": [said("human", "q")], "chosen": said("gpt", "yes"), "rejected": [NO]},
        [turn("system", "s"), Q],
    ),
    "prompt that brings its own system message": (
        {"system": "other", "prompt": [turn("system", "s"), Q], "chosen": "yes", "rejected": "no"},
        [turn("system", "s"), Q],
    ),
    "empty system column": (STRINGS | {"system": ""}, [Q]),
    "system of whole conversations": (
        {"system": "s", "chosen": [Q, YES], "rejected": [Q, NO]},
        [turn("system", "s"), Q],
    ),
    "transcript as prompt": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "yes", "rejected": "no"},
        [turn("user", "\n\nHuman: q\n\nAssistant:")],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    record, prompt = FORMS[form]
    row = parse(record, {})
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, [YES], [NO])
    assert ["id", *row, *(field.name for field in ORIGIN)] == PAIRS.names


def sides(record: dict[str, object]) -> tuple[object, object, object]:
    row = parse(record, {})
    return row["prompt"], row["chosen"], row["rejected"]


def test_answers_of_several_turns_share_their_beginning_with_the_prompt():
    record = {"prompt": [Q], "chosen": [*HISTORY[1:], YES], "rejected": [*HISTORY[1:], NO]}
    assert sides(record) == (HISTORY, [YES], [NO])


def test_conversations_that_part_early_keep_their_turns():
    chosen, rejected = [Q, YES, Q, YES], [Q, NO, Q, NO]
    assert sides({"prompt": "q", "chosen": chosen, "rejected": rejected}) == ([Q], chosen[1:], rejected[1:])


def test_conversations_with_different_prompts_share_nothing():
    other = [turn("user", "other"), NO]
    assert sides({"prompt": "q", "chosen": [Q, YES], "rejected": other}) == ([], [Q, YES], other)


def test_same_conversation_twice_keeps_its_answer():
    assert sides({"chosen": [Q, YES], "rejected": [Q, YES]}) == ([Q], [YES], [YES])


def test_empty_sides_are_for_clean_to_judge():
    assert sides({"prompt": "q", "chosen": "", "rejected": []}) == ([Q], [turn("assistant", "")], [])


@pytest.mark.parametrize(
    "extra",
    [
        {"score_chosen": 2, "score_rejected": 1.5},
        {"chosen-rating": 2, "rejected-rating": 1.5},
        {"chosen_score": 2, "rejected_score": 1.5},
        {"metadata": {"score_chosen": 2, "score_rejected": 1.5}},
        {"metadata.score_chosen": 2, "metadata.score_rejected": 1.5},
        {"score_chosen": None, "chosen_score": 2, "rejected_score": 1.5},
    ],
)
def test_scores_by_their_usual_names(extra):
    row = parse(STRINGS | extra, {})
    assert (row["score_chosen"], row["score_rejected"]) == (2.0, 1.5)


def test_models_and_subset():
    row = parse(STRINGS | {"chosen-model": "m", "rejected_model": "n", "subset": "flan"}, {})
    assert (row["model_chosen"], row["model_rejected"], row["subset"]) == ("m", "n", "flan")


def test_columns_by_other_names():
    record = {"question": "q", "out": {"good": "yes", "bad": "no"}, "s": {"g": 1}, "chosen": "not this"}
    columns = {"prompt": "question", "chosen": "out.good", "rejected": "out.bad", "score_chosen": "s.g"}
    row = parse(record, columns)
    assert (row["prompt"], row["chosen"], row["rejected"], row["score_chosen"]) == ([Q], [YES], [NO], 1.0)
    assert row["score_rejected"] is None


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (None, Unparsable, "the record is null, not an object"),
        ({"prompt": "q", "rejected": "no"}, MissingColumn, "no column 'chosen', found: prompt, rejected"),
        ({"prompt": "q", "chosen": "yes"}, MissingColumn, "no column 'rejected', found: prompt, chosen"),
        (
            {"chosen": "yes", "rejected": "no"},
            MissingColumn,
            "no column 'prompt' or 'conversations', found: chosen, rejected",
        ),
        ({"chosen": [YES], "rejected": [NO]}, MissingColumn, "no column 'prompt' or 'conversations'"),
        (STRINGS | {"prompt": None}, Unparsable, "column 'prompt' is null"),
        (STRINGS | {"chosen": None}, Unparsable, "column 'chosen' is null"),
        (STRINGS | {"chosen": 1}, Unparsable, "chosen is a number, neither a string nor messages"),
        (STRINGS | {"prompt": True}, Unparsable, "prompt is a boolean, neither a string nor messages"),
        (STRINGS | {"chosen": ["yes"]}, Unparsable, "chosen[0] is a string, not a message"),
        (STRINGS | {"chosen": [{"text": "x"}]}, Unparsable, "chosen[0] has neither 'role' nor 'from', found: text"),
        (STRINGS | {"chosen": {}}, Unparsable, "chosen has neither 'role' nor 'from', found: none"),
        (STRINGS | {"chosen": [turn("tool", "x")]}, Unparsable, "chosen[0].role is 'tool', none of user, human"),
        (STRINGS | {"chosen": [{"role": 1, "content": "x"}]}, Unparsable, "chosen[0].role is a number, not a string"),
        (STRINGS | {"chosen": [{"role": "user"}]}, Unparsable, "chosen[0].content is null, not a string"),
        (STRINGS | {"chosen": [{"from": "gpt", "value": []}]}, Unparsable, "chosen[0].value is a list, not a string"),
        (
            STRINGS | {"chosen": [YES | {"tool_calls": [{}]}]},
            Unparsable,
            "chosen[0] has 'tool_calls', which would be lost",
        ),
        (STRINGS | {"score_chosen": "5"}, Unparsable, "column 'score_chosen' is a string, not a number"),
        (STRINGS | {"score_chosen": 10**400}, Unparsable, "column 'score_chosen' is 1000"),
        (STRINGS | {"score_chosen": float("nan")}, Unparsable, "column 'score_chosen' is nan, too large for a score"),
        (STRINGS | {"score_chosen": True}, Unparsable, "column 'score_chosen' is a boolean, not a number"),
        (STRINGS | {"system": 1}, Unparsable, "column 'system' is a number, not a string"),
    ],
)
def test_unparsable(record, error, message):
    with pytest.raises(error) as caught:
        parse(record, {})
    assert message in str(caught.value)
    assert type(caught.value) is error


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text(max_size=2)}
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(MESSAGE, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "score_chosen"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = [name for names in COLUMNS.values() for name in names] + ["metadata"]


def parse_or_none(record: object) -> dict[str, object] | None:
    try:
        return parse(record, {})
    except Unparsable:
        return None


@given(st.dictionaries(st.sampled_from(NAMES), JSON, min_size=3) | JSON)
def test_any_json_parses_or_is_unparsable(record):
    row = parse_or_none(record)
    assert row is None or {"prompt", "chosen", "rejected"} <= set(row)
    assert row is None or all(turn["role"] in ("user", "assistant", "system") for turn in row["prompt"])


def count(records: list[object]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for record in records:
        row = parse(record, {})
        counts["rows"] += 1
        counts["one answer a side"] += len(row["chosen"]) == len(row["rejected"]) == 1
        counts["scored"] += row["score_chosen"] is not None and row["score_rejected"] is not None
        counts["identical"] += row["chosen"] == row["rejected"]
        counts["empty side"] += not (row["chosen"][0]["content"].strip() and row["rejected"][0]["content"].strip())
        counts["last asks"] += row["prompt"][-1]["role"] == "user"
    return counts


@real_data
def test_real_binarized_ultrafeedback():
    lines = gzip.decompress((REAL / "ultrafeedback_binarized" / "train.jsonl.gz").read_bytes()).splitlines()
    assert count([orjson.loads(line) for line in lines]) == {
        "rows": 700,
        "one answer a side": 700,
        "scored": 700,
        "identical": 2,
        "empty side": 1,
        "last asks": 700,
    }


@real_data
def test_real_sharegpt_pairs():
    records = orjson.loads(gzip.decompress((REAL / "pairs" / "sharegpt_pairs.json.gz").read_bytes()))
    counts = count(records)
    assert counts["rows"] == counts["one answer a side"] == counts["last asks"] == 300
    assert counts["scored"] == counts["identical"] == counts["empty side"] == 0
