"""What global steps share: columns of texts to take notes on, and all notes as one table to judge them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from orpo_data.schema import JUDGED
from orpo_data.steps.step import GlobalStep

ORIGIN = ("id", "source", "source_file", "source_row")  # tells one row from all others
CONTENT = pl.element().struct.field("content")

Rows = NDArray[np.int64]


def frame_of(table: pa.Table, *names: str) -> pl.DataFrame:
    """Some columns for polars."""
    frame = pl.from_arrow(table.select(names).combine_chunks())
    assert isinstance(frame, pl.DataFrame)
    return frame


def text_of(turns: pl.Expr) -> pl.Expr:
    """The contents of messages, line after line."""
    return turns.list.eval(CONTENT).list.join("\n")


def all_notes(step: GlobalStep, notes: Sequence[pa.Table]) -> pa.Table:
    """The notes of all parts, of which there may be none."""
    return pa.concat_tables(notes or [step.note(JUDGED.empty_table())])


def values(table: pa.Table, name: str, missing: Any = None) -> NDArray[Any]:
    """A column of numbers as one array, nulls as `missing`."""
    column = table[name] if missing is None else table[name].fill_null(missing)
    array: NDArray[Any] = column.to_numpy()
    return array


def origins(table: pa.Table, rows: Rows) -> pl.DataFrame:
    """id, source, source_file and source_row of some rows."""
    return frame_of(table.select(ORIGIN).take(rows), *ORIGIN)


def first_equal(keys: NDArray[np.uint64]) -> Rows:
    """For each place the first one with an equal key."""
    order = np.argsort(keys, kind="stable")
    new = np.ones(len(keys), bool)
    np.not_equal(keys[order[1:]], keys[order[:-1]], out=new[1:])
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))]
    return first


def for_parts(notes: Sequence[pa.Table], verdicts: pa.Table) -> list[pa.Table]:
    """The verdicts on all rows, cut into those on each part."""
    starts = np.cumsum([0, *map(len, notes)]).tolist()
    return [verdicts.slice(start, len(part)) for start, part in zip(starts, notes, strict=False)]


def on_rows(count: int, rows: Rows, found: pl.Series) -> pa.Array:
    """Texts found for some of `count` rows as a column for all."""
    column = pl.repeat(None, count, dtype=pl.String, eager=True).scatter(rows, found)
    return column.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())
