"""What rules measure by."""

import polars as pl
import pyarrow as pa
import pytest

from orpo_data.schema import JUDGED
from orpo_data.steps.rules.content import LengthRatio
from orpo_data.steps.rules.rule import pair_texts, quotient, text


@pytest.mark.parametrize("rejected", [["yes", "yes"], ["yes", "Why not?"]])
def test_a_figure_is_the_same_in_every_batch(make_pair, rejected):
    """28 characters for 3: 28 * (1 / 3) is less than 28 / 3, and polars takes it where all divisors are equal."""
    answers = ["It grows towards the window.", "Nobody can know such things."]
    pairs = [make_pair("Why?", *sides) for sides in zip(answers, rejected, strict=True)]
    table = pa.Table.from_pylist([{"flags": []} | pair for pair in pairs], schema=JUDGED)
    figure = LengthRatio().measure("chosen")
    together = pair_texts(table).select(figure).to_series().to_list()
    alone = [pair_texts(table.slice(row, 1)).select(figure).item() for row in range(2)]
    assert together == alone == [28 / len(other) for other in rejected]


def test_a_quotient_of_nothing():
    empty = pl.DataFrame(schema={"chosen_text": pl.String, "rejected_text": pl.String})
    sizes = [text(side).str.len_chars() for side in ("chosen", "rejected")]
    assert empty.select(quotient(*sizes)).to_series().to_list() == []
