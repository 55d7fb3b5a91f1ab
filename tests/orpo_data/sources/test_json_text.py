"""JSON text read in bulk says what a reader of single records says, or nothing."""

from collections.abc import Sequence
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.sources.json_text import MOST_FIELDS, read_alike, type_of

TEXT, NUMBER = pa.string(), pa.float64()
PAIR = '{"chosen": "a", "rejected": "b"}'
KIND = pa.struct({"chosen": TEXT, "rejected": TEXT})


def rows(records: Sequence[str], kind: pa.StructType = KIND) -> list[dict[str, Any]] | None:
    found = read_alike(pa.array(records, pa.string()), kind)
    return None if found is None else found.to_pylist()


def test_records_come_as_columns() -> None:
    records = [PAIR, '{ "rejected":"\\u00e9\\ud83d\\ude00\\/\\u0000","ch\\u006fsen" : "\\n\\"}{" }', '{"chosen": null}']
    assert rows(records) == [
        {"chosen": "a", "rejected": "b"},
        {"chosen": '\n"}{', "rejected": "é😀/\0"},
        {"chosen": None, "rejected": None},
    ]


def test_nested_values() -> None:
    kind = pa.struct({"turns": pa.list_(pa.struct({"role": TEXT})), "meta": pa.struct({"score": NUMBER})})
    records = [
        '{"meta": {"score": 1}, "turns": [{"role": "x"}, null, {}]}',
        '{"meta": {}, "turns": []}',
        '{"meta": null}',
    ]
    assert rows(records, kind) == [
        {"turns": [{"role": "x"}, None, {"role": None}], "meta": {"score": 1.0}},
        {"turns": [], "meta": {"score": None}},
        {"turns": None, "meta": None},
    ]


def test_a_slice_is_read_by_itself() -> None:
    records = pa.array(["broken", PAIR, PAIR.replace("a", "c"), "broken"]).slice(1, 2)
    found = read_alike(records, KIND)
    assert found is not None
    assert found.to_pylist() == [{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "b"}]


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        PAIR + PAIR,
        PAIR.replace('"b"', "1"),
        PAIR.replace('"b"', "true"),
        PAIR.replace('"b"', '["b"]'),
        PAIR.replace('"b"', '"\\ud83d"'),
        PAIR.replace('"b"', '"\\q"'),
        PAIR.replace('"b"', '"\t"'),
        PAIR.replace("}", ', "id": 1}'),
        PAIR.replace("}", ', "chosen": "c"}'),
        PAIR.replace("}", ",}"),
        PAIR.replace("chosen", "chosen\\u0000"),
        "\ufeff" + PAIR,
    ],
)
def test_any_other_record_leaves_all_to_others(record: str) -> None:
    assert rows([PAIR, record]) is None


@pytest.mark.parametrize("figure", ["NaN", "-Infinity", "1e999", "01", "1.", "+1", '"1"', "false"])
@pytest.mark.parametrize("record", ['{"n": %s}', '{"o": {"n": %s}}', '{"l": [0, %s]}'])
def test_figures_that_json_does_not_have_are_not_read(record: str, figure: str) -> None:
    kind = pa.struct({"n": NUMBER, "o": pa.struct({"n": NUMBER}), "l": pa.list_(NUMBER)})
    assert rows([record % "0"], kind) is not None
    assert rows([record % "0", record % figure], kind) is None


def test_values_that_do_not_end_with_their_records_are_not_counted_as_theirs() -> None:
    """As many values as records, but not one each."""
    assert rows([PAIR + '{"chosen": "a"', ', "rejected": "b"}']) is None
    assert rows(['{"chosen": "a", "rejected": "}', '{"}' + PAIR]) is None


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None], pa.null()),
        ([1, None, 2.5], NUMBER),
        (["a", None], TEXT),
        ([True], pa.bool_()),
        ([[], None, [None]], pa.list_(TEXT)),
        ([[1], ["a"]], None),
        ([1, True], None),
        (["a", 1], None),
        ([{"a": 1}, {"b": {}}], pa.struct({"a": NUMBER, "b": pa.struct([])})),
        ([{"a": 1}, []], None),
        ([dict.fromkeys(map(str, range(MOST_FIELDS + 1)))], None),
    ],
)
def test_type_of(values: list[Any], kind: pa.DataType | None) -> None:
    if kind is not None:
        assert type_of(values) == kind
        return
    with pytest.raises(ValueError, match=r"types|fields"):
        type_of(values)


FRAGMENTS = st.sampled_from(
    [PAIR, *'{}[]",: \\', '"chosen"', '"rejected"', '"chosen":"}{"', "\\u0041", "\\udc00", "null"]
)


@given(st.lists(st.lists(FRAGMENTS, max_size=6).map("".join) | st.just(PAIR), max_size=4))
def test_what_is_read_is_what_the_records_say(records: list[str]) -> None:
    if (found := rows(records)) is not None:
        assert found == [{"chosen": None, "rejected": None} | orjson.loads(record) for record in records]


KEY = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=2)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(KEY, JSON, max_size=3), st.integers(1, 3))
def test_a_record_has_the_type_that_it_is_read_by(record: dict[str, Any], times: int) -> None:
    try:
        kind = type_of([record])
    except ValueError:
        return
    assert rows([orjson.dumps(record).decode()] * times, kind) == [_filled(record, kind)] * times


def _filled(value: Any, kind: pa.DataType) -> Any:
    """As Arrow has it: every object with all its fields."""
    if pa.types.is_struct(kind) and value is not None:
        return {field.name: _filled(value.get(field.name), field.type) for field in kind}
    if pa.types.is_list(kind) and value is not None:
        return [_filled(item, kind.value_type) for item in value]
    return value
