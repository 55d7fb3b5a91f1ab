"""Tables as records: the same whichever way a column is encoded, and measured before it is written out."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import RAW
from orpo_data.sources.json_text import ROWS
from orpo_data.sources.tables import _pieces, row_bytes, table_records
from orpo_data.steps.parse import Parse

TEXTS = pa.dictionary(pa.int8(), pa.string())
ROWS_OF = {"role": "user", "content": "é"}, {"role": "assistant", "content": "ab"}
KINDS: dict[str, tuple[pa.DataType, list[Any], list[int]]] = {
    "text": (pa.string(), ["é", None, "", "abc"], [2, 0, 0, 3]),
    "large": (pa.large_string(), ["é", None, "", "abc"], [2, 0, 0, 3]),
    "view": (pa.string_view(), ["é", None, "a text of some length", "abc"], [2, 0, 21, 3]),
    "bytes": (pa.binary(), [b"a", None, b"", b"abc"], [1, 0, 0, 3]),
    "dictionary": (TEXTS, ["abc", None, "abc", "d"], [3, 0, 3, 1]),
    "number": (pa.int32(), [1, None, 2, 3], [8] * 4),
    "list": (pa.list_(TEXTS), [["ab", "c"], None, [], [None]], [19, 0, 0, 8]),
    "large list": (pa.large_list(pa.int8()), [[1, 2], None, [], [3]], [32, 0, 0, 16]),
    "fixed list": (pa.list_(pa.string(), 2), [["a", "b"], ["", ""], ["c", None], ["d", "e"]], [18, 16, 17, 18]),
    "map": (pa.map_(pa.string(), pa.int8()), [[("k", 1)], None, [], [("l", 2)]], [17, 0, 0, 17]),
    "messages": (
        pa.list_(pa.struct([("role", TEXTS), ("content", pa.string())])),
        [[*ROWS_OF], None, [ROWS_OF[0]], []],
        [33, 0, 14, 0],
    ),
    "struct": (
        pa.struct([("a", pa.struct([])), ("b", TEXTS)]),
        [{"a": {}, "b": "x"}, None, {}, {"b": "yz"}],
        [1, 0, 0, 2],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (1, 3), (3, 4), (2, 2)])
def test_each_row_is_measured_by_itself(kind: str, start: int, stop: int) -> None:
    """The lengths of its texts, 8 bytes for each other value and each place of a list."""
    type_, values, expected = KINDS[kind]
    column = pa.array(values, type_)
    assert row_bytes(column.slice(start, stop - start)).tolist() == expected[start:stop]


@pytest.mark.parametrize("kind", [pa.list_view(pa.int8()), pa.run_end_encoded(pa.int32(), pa.int8())])
def test_types_whose_rows_share_parts_are_refused(kind: pa.DataType) -> None:
    with pytest.raises(ValueError, match=r"a column of the type .* is not read"):
        row_bytes(pa.array([], kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bytes"])
@pytest.mark.parametrize("way", ["parquet", "plain parquet", "arrow"])
def test_records_are_the_same_however_they_are_encoded(tmp_path: Path, kind: str, way: str) -> None:
    type_, values, _ = KINDS[kind]
    table = pa.table({"n": range(4), "x": pa.array(values, type_)})
    path = tmp_path / "table"
    if way == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    elif kind in ("view", "struct", "map"):
        return  # not every version writes these to parquet
    else:
        pq.write_table(table, path, use_dictionary=way == "parquet")
    records = [record for rows in table_records(path, way != "arrow") for record in rows["record"].to_pylist()]
    assert [json.loads(record) for record in records] == json.loads(json.dumps(table.to_pylist()))


@given(sizes=st.lists(st.integers(0, 30), max_size=40), limit=st.integers(1, 60), rows=st.integers(1, 9))
def test_pieces_are_all_rows_in_order_and_within_the_limit(sizes: list[int], limit: int, rows: int) -> None:
    """Of 1,000 rows at most; by hand: 3 3 3 9 1 within 6 are 3 3, 3, 9 and 1."""
    pieces = list(_pieces(pa.array(sizes, pa.int64()).to_numpy(), limit))
    assert [row for start, stop in pieces for row in range(start, stop)] == [*range(len(sizes))]
    assert all(sum(sizes[start:stop]) <= limit or stop - start == 1 for start, stop in pieces)
    many = list(_pieces(pa.array([0] * (rows * ROWS + 1)).to_numpy(), limit))
    assert [stop - start for start, stop in many] == [ROWS] * rows + [1]


def test_pieces_by_hand() -> None:
    assert list(_pieces(pa.array([3, 3, 3, 9, 1]).to_numpy(), 6)) == [(0, 2), (2, 3), (3, 4), (4, 5)]


@pytest.mark.parametrize("kind", [pa.string(), pa.struct([("a\0b", pa.string())])])
def test_any_name_of_a_column(tmp_path: Path, kind: pa.DataType) -> None:
    value = "x" if kind == pa.string() else {"a\0b": "x"}
    pq.write_table(pa.table({"pro\0mpt" if kind == pa.string() else "prompt": pa.array([value], kind)}), tmp_path / "t")
    (table,) = table_records(tmp_path / "t", parquet=True)
    assert list(json.loads(table["record"][0].as_py()).values()) == [value]


def test_a_value_that_python_has_not_costs_its_row(tmp_path: Path) -> None:
    days = pa.array([0, 2**22, 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "day": days}), tmp_path / "t")
    (table,) = table_records(tmp_path / "t", parquet=True)
    first, second, third = table["record"].to_pylist()
    assert [json.loads(record)["day"] for record in (first, third)] == ["1970-01-01", "1970-01-02"]
    origin = {"source": "pairs", "source_file": "t", "source_row": 1}
    dropped = Parse(dataset="pairs").apply(pa.Table.from_pylist([origin | {"record": second}], RAW)).dropped
    assert dropped["detail"].to_pylist() == ["not to be written as JSON: date value out of range"]
