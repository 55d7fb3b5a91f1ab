"""JSON text read in bulk says what a reader of single records says, or nothing."""

from collections.abc import Sequence

import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.sources.json_text import string_columns

PAIR = '{"chosen": "a", "rejected": "b"}'


def columns(records: Sequence[str]) -> list[list[str]] | None:
    found = string_columns(pa.array(records, pa.string()), ["chosen", "rejected"])
    return None if found is None else [column.to_pylist() for column in found]


def test_strings_come_as_columns() -> None:
    records = [PAIR, '{ "rejected":"\\u00e9\\ud83d\\ude00\\/\\u0000","ch\\u006fsen" : "\\n\\"}{" }']
    assert columns(records) == [["a", '\n"}{'], ["b", "é😀/\0"]]


def test_a_slice_is_read_by_itself() -> None:
    records = pa.array(["broken", PAIR, PAIR.replace("a", "c"), "broken"]).slice(1, 2)
    found = string_columns(records, ["rejected", "chosen"])
    assert found is not None
    assert [column.to_pylist() for column in found] == [["b", "b"], ["a", "c"]]


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{}",
        "[]",
        PAIR + PAIR,
        PAIR.replace('"b"', "null"),
        PAIR.replace('"b"', "1"),
        PAIR.replace('"b"', '"\\ud83d"'),
        PAIR.replace('"b"', '"\\q"'),
        PAIR.replace('"b"', '"\t"'),
        PAIR.replace("}", ', "id": 1}'),
        PAIR.replace("}", ', "chosen": "c"}'),
        PAIR.replace("}", ",}"),
        "\ufeff" + PAIR,
    ],
)
def test_any_other_record_leaves_all_to_others(record: str) -> None:
    assert columns([PAIR, record]) is None


def test_values_that_do_not_end_with_their_records_are_not_counted_as_theirs() -> None:
    """As many values as records, but not one each."""
    assert columns([PAIR + '{"chosen": "a"', ', "rejected": "b"}']) is None
    assert columns(['{"chosen": "a", "rejected": "}', '{"}' + PAIR]) is None


FRAGMENTS = st.sampled_from(
    [PAIR, *'{}[]",: \\', '"chosen"', '"rejected"', '"chosen":"}{"', "\\u0041", "\\udc00", "null"]
)


@given(st.lists(st.lists(FRAGMENTS, max_size=6).map("".join) | st.just(PAIR), max_size=4))
def test_what_is_read_is_what_the_records_say(records: list[str]) -> None:
    if (found := columns(records)) is not None:
        values = [orjson.loads(record) for record in records]
        assert [dict(zip(("chosen", "rejected"), row, strict=True)) for row in zip(*found, strict=True)] == values
