"""UltraFeedback: rated answers, in the two forms that were published."""

from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import ORIGIN, RATED
from orpo_data.sources.record import MissingColumn, Unparsable
from orpo_data.sources.ultrafeedback import ASPECT_SCALE, OVERALL_SCALE, parse, rating

ASPECT = {"Rating": "4", "Rationale": "good"}
COMPLETION = {
    "model": "alpaca-7b",
    "principle": "helpfulness",
    "custom_system_prompt": "Be helpful.",
    "response": "Paris.",
    "critique": "short",
    "overall_score": 7.5,
    "fine-grained_score": 4.0,
    "annotations": {
        "instruction_following": ASPECT,
        "honesty": {"Rating": "N/A", "Rationale": ""},
        "truthfulness": {"Type": ["1"], "Rationale": "", "Rating": "5", "Rationale For Rating": ""},
        "helpfulness": {"Type": ["1"], "Rationale": "no rating given"},
    },
}
RECORD = {
    "source": "flan",
    "instruction": "Capital of France?",
    "models": ["alpaca-7b"],
    "completions": [COMPLETION],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
ROW = {
    "prompt": [{"role": "user", "content": "Capital of France?"}],
    "completions": [
        {
            "model": "alpaca-7b",
            "response": "Paris.",
            "system_prompt": "Be helpful.",
            "overall_score": 7.5,
            "instruction_following": 4.0,
            "honesty": None,
            "truthfulness": 5.0,
            "helpfulness": None,
        }
    ],
    "subset": "flan",
}


def with_completion(**changes: object) -> dict[str, object]:
    return {**RECORD, "completions": [COMPLETION | changes]}


def test_row_by_hand():
    assert parse(RECORD, {}) == ROW
    assert ["id", *parse(RECORD, {}), *(field.name for field in ORIGIN)] == RATED.names


def test_each_aspect_may_be_a_list_of_one():
    record = deepcopy(RECORD)
    record["completions"][0]["annotations"] = {aspect: [value] for aspect, value in COMPLETION["annotations"].items()}
    assert parse(record, {}) == ROW


def test_what_is_missing_is_null():
    row = parse({"instruction": "q", "completions": [{"response": "a"}]}, {})
    assert row["subset"] is None
    assert [name for name, value in row["completions"][0].items() if value is not None] == ["response"]


def test_no_completions_is_for_binarize_to_judge():
    assert parse({"instruction": "q", "completions": []}, {})["completions"] == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", 1.0), (" 5\n", 5.0), ("N/A", None), ("n/a", None), ("", None), (None, None), (3, 3.0), ("4.5", 4.5)],
)
def test_rating(value, expected):
    assert rating(value, "x", ASPECT_SCALE) == expected


@pytest.mark.parametrize("value", ["four", "nan", "inf", True, [], {}, 1e39, float("inf"), "1e39", 10**30])
def test_no_rating(value):
    with pytest.raises(Unparsable, match=r"^here\.Rating is "):
        rating(value, "here.Rating", ASPECT_SCALE)


@pytest.mark.parametrize(
    ("value", "scale", "shown"),
    [
        ("0", ASPECT_SCALE, "0, not within 1 to 5"),
        (0.99, ASPECT_SCALE, "0.99, not within 1 to 5"),
        ("6", ASPECT_SCALE, "6, not within 1 to 5"),
        (-1, OVERALL_SCALE, "-1, not within 0 to 10"),
        (75, OVERALL_SCALE, "75, not within 0 to 10"),
    ],
)
def test_a_rating_off_its_scale(value, scale, shown):
    with pytest.raises(Unparsable, match=f"^x is {shown}$"):
        rating(value, "x", scale)


@pytest.mark.parametrize("value", [0, 0.75, "0.8", 10])
def test_an_overall_score_may_be_below_one(value):
    assert rating(value, "x", OVERALL_SCALE) == float(value)


def test_any_number_of_completions():
    for count in (0, 1, 5, 50):
        assert len(parse({"instruction": "q", "completions": [{"response": "a"}] * count}, {})["completions"]) == count


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ("text", Unparsable, "the record is a string, not an object"),
        ({"completions": []}, MissingColumn, "no column 'instruction', found: completions"),
        ({"instruction": "q"}, MissingColumn, "no column 'completions', found: instruction"),
        (RECORD | {"instruction": None}, Unparsable, "column 'instruction' is null"),
        (RECORD | {"instruction": 3}, Unparsable, "column 'instruction' is a number, not a string"),
        (RECORD | {"source": 3}, Unparsable, "column 'source' is a number, not a string"),
        (RECORD | {"completions": None}, Unparsable, "column 'completions' is null"),
        (RECORD | {"completions": {}}, Unparsable, "column 'completions' is an object, not a list"),
        (RECORD | {"completions": ["a"]}, Unparsable, "completions[0] is a string, not an object"),
        (RECORD | {"completions": [{}]}, Unparsable, "completions[0].response is null, not a string"),
        (with_completion(model=1), Unparsable, "completions[0].model is a number, not a string"),
        (with_completion(custom_system_prompt=[]), Unparsable, "completions[0].custom_system_prompt is a list"),
        (with_completion(overall_score="good"), Unparsable, "overall_score is 'good', neither a number nor 'N/A'"),
        (with_completion(annotations=["x"]), Unparsable, "completions[0].annotations is a list, not an object"),
        (with_completion(annotations={"honesty": "4"}), Unparsable, "annotations.honesty is a string, not an object"),
        (with_completion(annotations={"honesty": [ASPECT, ASPECT]}), Unparsable, "annotations.honesty is a list"),
        (with_completion(annotations={"honesty": {"Rating": "x"}}), Unparsable, "annotations.honesty.Rating is 'x'"),
        (with_completion(annotations={"honesty": {"Rating": "6"}}), Unparsable, "honesty.Rating is 6, not within 1 to"),
        (with_completion(overall_score=11), Unparsable, "completions[0].overall_score is 11, not within 0 to 10"),
    ],
)
def test_unparsable(record, error, message):
    with pytest.raises(error) as caught:
        parse(record, {})
    assert message in str(caught.value)
    assert type(caught.value) is error


def test_columns_by_other_names():
    row = parse({"q": "hi", "answers": [], "meta": {"part": "p"}}, COLUMNS)
    assert row == {"prompt": [{"role": "user", "content": "hi"}], "completions": [], "subset": "p"}


COLUMNS = {"instruction": "q", "completions": "answers", "subset": "meta.part"}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["N/A", "4"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["response", "model", "annotations", "honesty", "Rating", "overall_score"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def parse_or_none(record: object) -> dict[str, object] | None:
    try:
        return parse(record, {})
    except Unparsable:
        return None


@given(st.fixed_dictionaries({"instruction": st.just("q"), "completions": st.lists(JSON, max_size=3)}) | JSON)
def test_any_json_parses_or_is_unparsable(record):
    row = parse_or_none(record)
    assert row is None or set(row) == set(ROW)
