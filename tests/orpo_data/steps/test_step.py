"""What a step turns away is kept as it was."""

import math
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import DROPPED
from orpo_data.steps.step import dropped_rows

ROW = {
    "id": pa.string(),
    "source": pa.string(),
    "source_file": pa.string(),
    "source_row": pa.int32(),
    "rows": pa.int64(),
    "chosen": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "score_chosen": pa.float32(),
    "margin": pa.float64(),
    "prompt_ids": pa.list_(pa.int32()),
    "truncated": pa.bool_(),
}
TEXTS = st.none() | st.text()
MESSAGES = st.fixed_dictionaries({"role": TEXTS, "content": TEXTS})
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "id": TEXTS,
    "source": TEXTS,
    "source_file": TEXTS,
    "source_row": st.none() | st.integers(0, 2**31 - 1),
    "rows": st.none() | st.integers(-(2**63), 2**63 - 1),
    "chosen": st.none() | st.lists(st.none() | MESSAGES, max_size=3),
    "score_chosen": st.none() | st.floats(width=32),
    "margin": st.none() | st.floats(),
    "prompt_ids": st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=5),
    "truncated": st.none() | st.booleans(),
}


@given(st.lists(st.fixed_dictionaries(VALUES), max_size=4), st.integers(0, 4))
def test_a_dropped_row_says_what_it_held(rows: list[dict[str, Any]], cut: int) -> None:
    """In JSON, which has no number for those that are not finite."""
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(ROW.items())))
    table = pa.concat_tables([table.slice(0, cut), table.slice(cut)])  # as it comes: in several chunks, sliced
    reasons = pa.array(["for_a_reason"] * len(rows), pa.string())
    dropped = dropped_rows("step", table, reasons, reasons)
    assert dropped.schema == DROPPED
    assert dropped["source_row"].to_pylist() == [row["source_row"] for row in rows]
    for row, text in zip(rows, dropped["row"].to_pylist(), strict=True):
        told = orjson.loads(text)
        assert list(told) == list(ROW)
        assert told.pop("score_chosen") == _in_json(row["score_chosen"], single=True)
        assert told == {name: _in_json(value) for name, value in row.items() if name != "score_chosen"}


def _in_json(value: Any, *, single: bool = False) -> Any:
    """A float of single precision by the fewest digits that tell it from others."""
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(str(np.float32(value))) if single else value
    return value


def test_a_record_that_could_not_be_parsed_is_kept_as_it_is() -> None:
    record = pa.table({"record": ["{half"], "source": ["s"], "source_file": ["f"], "source_row": [1]})
    dropped = dropped_rows("parse", record, pa.array(["unparsable"]), pa.array([None], pa.string()))
    assert dropped.to_pylist()[0] | {"row": "{half", "id": None} == dropped.to_pylist()[0]
