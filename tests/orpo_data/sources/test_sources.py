"""What all sources have in common: the check of a file's columns, and the names a recipe may give them."""

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.errors import OrpoError
from orpo_data.schema import PAIRS, RATED
from orpo_data.sources import SOURCES, check_column_names, check_settings, require_columns
from orpo_data.sources.columns import reached
from orpo_data.sources.record import Unparsable, has_column, reach


def test_every_source_offers_the_same():
    assert {name: source.schema for name, source in SOURCES.items()} == {
        "ultrafeedback": RATED,
        "hh-rlhf": PAIRS,
        "pairs": PAIRS,
    }


@pytest.mark.parametrize("dataset", SOURCES)
def test_a_column_that_is_not_there_stops(dataset):
    with pytest.raises(OrpoError) as error:
        require_columns(dataset, '{"question": "q", "good": "x"}', {}, "a.jsonl")
    message = str(error.value)
    assert message.startswith("a.jsonl: no column ")
    assert "found: question, good; say in the recipe under `columns:`" in message
    assert "\n" not in message


def test_a_column_that_the_recipe_names_must_be_there():
    record = '{"prompt": "q", "chosen": "a", "rejected": "b", "score": 1}'
    assert require_columns("pairs", record, {"score_chosen": "score"}, "a.jsonl")
    with pytest.raises(OrpoError, match=r"^a\.jsonl: no column 'scor', found: prompt, chosen, rejected, score;"):
        require_columns("pairs", record, {"score_chosen": "scor"}, "a.jsonl")


@pytest.mark.parametrize("record", ["{broken", "[1]", "null", ""])
def test_a_record_that_cannot_tell(record):
    assert not require_columns("pairs", record, {}, "a.jsonl")


def test_a_broken_row_is_not_a_wrong_column():
    assert require_columns("pairs", '{"prompt": 1, "chosen": 2, "rejected": 3}', {}, "a.jsonl")


@pytest.mark.parametrize(
    ("dataset", "key", "nearest"),
    [("pairs", "chosn", "chosen"), ("hh-rlhf", "reject", "rejected"), ("ultrafeedback", "prompt", "instruction")],
)
def test_unknown_key_names_the_nearest(dataset, key, nearest):
    check_column_names(dataset, {nearest: "x"})
    with pytest.raises(ValueError, match=f"unknown key '{key}' for {dataset}, did you mean"):
        check_column_names(dataset, {key: "x"})


def test_nearest_key():
    with pytest.raises(ValueError, match="did you mean 'score_chosen'"):
        check_column_names("pairs", {"score_chosn": "x"})


@pytest.mark.parametrize(
    ("record", "column", "value", "there"),
    [
        ({"a": 1}, "a", 1, True),
        ({"a": None}, "a", None, True),
        ({}, "a", None, False),
        ({"a": {"b": {"c": 1}}}, "a.b.c", 1, True),
        ({"a": {"b": None}}, "a.b", None, True),
        ({"a": {"b": 1}}, "a.c", None, False),
        ({"a": None}, "a.b", None, True),  # an object that this row leaves out
        ({"a.b": 1, "a": {"b": 2}}, "a.b", 1, True),
        ({"a": {"b.c": 1}}, "a.b.c", 1, True),
    ],
)
def test_dotted_names(record, column, value, there):
    assert (reach(record, column), has_column(record, column)) == (value, there)


DOTTED = st.sampled_from(["a", "b", "a.b", "b.a", "a.b.a"])
OBJECTS = st.recursive(
    st.dictionaries(DOTTED, st.none() | st.integers(0, 3), max_size=3),
    lambda inner: st.dictionaries(DOTTED, inner | st.none() | st.integers(0, 3) | st.just("text"), max_size=3),
    max_leaves=6,
)


@given(records=st.lists(OBJECTS, max_size=5), column=DOTTED)
@example(records=[{"a": {"b": 1}}, {"a": 2}, {"a": None}, {"a.b": 3}, {}], column="a.b")
def test_names_in_many_records_reach_what_they_reach_in_each(records, column):
    assert reached(records, column) == [reach(record, column) for record in records]


def test_diverges_is_for_dialogues():
    check_settings("hh-rlhf", {"chosen": "good"}, "keep-common-prefix")
    check_settings("pairs", {}, "keep-common-prefix")
    check_settings("ultrafeedback", {}, "drop")
    with pytest.raises(ValueError, match=r"^diverges: ultrafeedback has no dialogues"):
        check_settings("ultrafeedback", {}, "keep-common-prefix")
    with pytest.raises(ValueError, match="unknown key 'chosn'"):
        check_settings("pairs", {"chosn": "x"}, "drop")


# --- whatever a record holds -----------------------------------------------------------------------------------------

NAMES = sorted({name for source in SOURCES.values() for names in source.columns.values() for name in names})
KEYS = [*NAMES, "role", "content", "from", "value", "response", "annotations", "honesty", "Rating", "overall_score"]
TEXTS = ["", "N/A", "4", "user", "assistant", "\n\nHuman: q\n\nAssistant: a", "\n\nHum: \x00", "\u2028", "1e400", "nan"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.sampled_from(TEXTS) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=6),
    max_leaves=20,
)
RECORDS = JSON | st.dictionaries(st.sampled_from(NAMES), JSON, min_size=2, max_size=6)


def row_or_message(dataset: str, record: object) -> tuple[dict[str, object] | None, str]:
    try:
        return SOURCES[dataset].parse(record, {}), ""
    except Unparsable as error:
        return None, str(error)


@pytest.mark.parametrize("dataset", SOURCES)
@given(record=RECORDS)
def test_any_value_is_a_row_or_unparsable_in_one_short_line(dataset, record):
    row, said = row_or_message(dataset, record)
    assert "\n" not in said
    assert len(said) < 1500
    assert row is None or {"id", *row, "source", "source_file", "source_row"} == set(SOURCES[dataset].schema.names)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


BIG = "x" * 10_000_000
HOSTILE = {
    "a column of a million names": {f"name {i}": 0 for i in range(1_000_000)},
    "a name of ten million letters": {BIG: "x"},
    "names over several lines": {"a\nb": 1, "\x1b[31m": 2},
    "ten million letters for a role": {"prompt": [{"role": BIG, "content": "q"}], "chosen": "a", "rejected": "b"},
    "ten million letters for a rating": {"instruction": "q", "completions": [{"response": "a", "overall_score": BIG}]},
    "ten million digits for a rating": {
        "instruction": "q",
        "completions": [{"response": "a", "overall_score": "1" * 10_000_000}],
    },
    "text without labels": {"chosen": BIG, "rejected": BIG},
    "nested to the parser's limit": orjson.loads('{"instruction": "q", "completions": ' + nested(1000) + "}"),
}


@pytest.mark.parametrize("dataset", SOURCES)
@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
def test_hostile_records_cost_one_short_line(dataset, record):
    with pytest.raises(Unparsable) as error:
        SOURCES[dataset].parse(record, {})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


def test_a_missing_column_of_a_hostile_record_is_one_short_line_too():
    with pytest.raises(OrpoError) as error:
        require_columns("pairs", orjson.dumps(HOSTILE["names over several lines"]).decode(), {}, "a.jsonl")
    assert "found: 'a\\nb', '\\x1b[31m';" in str(error.value)
