"""Ids: many at once are those of one at a time, byte for byte."""

from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import PAIRS, pair_id, pair_ids, row_id, row_ids

TEXT = st.text(st.characters(codec="utf-8"), max_size=6) | st.text(
    '"\\/\b\f\n\r\t\x00\x1f\x7f\x85\u2028\u2029é😀', max_size=6
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3)


def test_an_id_by_hand():
    # echo -n '{"chosen":[{"content":"a","role":"assistant"}],"prompt":[],"rejected":[]}' | sha256sum
    answer = [{"role": "assistant", "content": "a"}]
    assert pair_id([], answer, []) == "c8cc28e76ee240f88342fcad6ef5a4a2"
    frame = pl.DataFrame({"prompt": [[]], "chosen": [answer], "rejected": [[]]}, schema=pairs_frame([]).schema)
    assert pair_ids(frame).to_pylist() == [pair_id([], answer, [])]


def pairs_frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    sides = pa.schema([PAIRS.field(name) for name in ("prompt", "chosen", "rejected")])
    frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=sides))
    assert isinstance(frame, pl.DataFrame)
    return frame


@given(st.lists(st.fixed_dictionaries({"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}), max_size=5))
def test_ids_of_pairs(rows):
    assert pair_ids(pairs_frame(rows)).to_pylist() == [pair_id(**row) for row in rows]


def test_every_character_there_is():
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    texts = ["".join(characters[start : start + 256]) for start in range(0, len(characters), 256)]
    assert row_ids(pl.DataFrame({"text": texts})).to_pylist() == [row_id({"text": text}) for text in texts]


RATED_ROW = st.fixed_dictionaries(
    {
        "prompt": TEXT,
        "completions": st.lists(
            st.none()
            | st.fixed_dictionaries(
                {
                    "response": TEXT | st.none(),
                    "helpfulness": st.floats(allow_nan=False, allow_infinity=False) | st.none(),
                    "honesty": st.sampled_from([0.0, -0.0, 1.0, 2.5, 8.3, 1e-5, 1e-7, 1e16, 5e-324]),
                }
            ),
            max_size=3,
        ),
    }
)


@given(st.lists(RATED_ROW, max_size=5))
def test_ids_of_texts_numbers_lists_and_structs_whatever_the_order_of_their_fields(rows):
    answer = pl.Struct({"response": pl.String, "honesty": pl.Float64, "helpfulness": pl.Float64})
    frame = pl.DataFrame(rows, schema={"prompt": pl.String, "completions": pl.List(answer)})
    assert row_ids(frame).to_pylist() == [row_id(row) for row in rows]


@pytest.mark.parametrize("decimals", [1, 2, 3])
def test_every_mark_that_a_critic_could_give(decimals):
    marks = [number / 10**decimals for number in range(10 * 10**decimals + 1)]
    assert row_ids(pl.DataFrame({"mark": marks})).to_pylist() == [row_id({"mark": mark}) for mark in marks]
