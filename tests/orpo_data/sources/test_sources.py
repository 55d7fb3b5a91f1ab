"""What all sources have in common: the check of a file's columns, and the names a recipe may give them."""

import pytest

from orpo_data.errors import OrpoError
from orpo_data.schema import PAIRS, RATED
from orpo_data.sources import SOURCES, check_column_names, require_columns
from orpo_data.sources.record import has_column, reach


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
