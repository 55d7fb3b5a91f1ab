"""From raw records to rows: JSON text in, RATED or PAIRS out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import orjson
import polars as pl
import pyarrow as pa
from pydantic import Field, model_validator

from orpo_data.schema import DROPPED, MESSAGE, MESSAGES, ORIGIN, no_rows, row_id, row_ids
from orpo_data.sources import SOURCES, Diverging, Source, check_settings
from orpo_data.sources.columns import Bools, Columns, Fields, Ints, Odd, Records, Rows, join
from orpo_data.sources.json_text import LIMITS, NO_JSON, NOT_UTF8, TOO_LONG, read_alike, type_of
from orpo_data.sources.record import Turn, Unparsable, first_answers
from orpo_data.steps.step import Step, StepOutput, dropped_rows

ID_COLUMNS = ("prompt", "completions", "chosen", "rejected")
"""What the id is a hash of, as far as a schema has them."""

PIECE = 32  # records decoded at a time: their objects stay in the processor's cache, and too few for Python's collector
FEW = 4  # records: so many or fewer are read one by one when one of them is odd


class Parse(Step):
    """Reads each record by the rules of its upstream; a record that does not follow them is dropped as unparsable."""

    name: ClassVar[str] = "parse"
    version: ClassVar[int] = 3

    dataset: Literal["ultrafeedback", "hh-rlhf", "pairs"] = Field(description="The upstream format.")
    columns: dict[str, str] = Field(
        default={}, description="Our name of a column to the name it has in the files; dots reach into objects."
    )
    diverges: Diverging = Field(
        default="drop",
        description="Dialogues whose histories differ before the last turn: as they are, for `clean` to drop them, or "
        "each cut behind the first answer that differs, with the turns before it as the prompt.",
    )

    max_record_bytes: int = Field(default=LIMITS.record, description="Longer lines were not read.")

    @model_validator(mode="after")
    def _fits_the_dataset(self) -> Self:
        check_settings(self.dataset, self.columns, self.diverges)
        return self

    def apply(self, table: pa.Table) -> StepOutput:
        """The ordinary records by columns, the others one by one."""
        ordinary, odd = self._by_columns(table)
        if not len(odd):
            return StepOutput(ordinary, no_rows(DROPPED))
        one_by_one, kept = self._one_by_one(table.take(odd))
        places = np.concatenate((np.delete(np.arange(len(table)), odd), odd[kept]))
        rows = pa.concat_tables([ordinary, one_by_one.kept]).take(np.argsort(places))
        return replace(one_by_one, kept=rows)

    def _by_columns(self, table: pa.Table) -> tuple[pa.Table, Ints]:
        """The rows of ordinary records, and the places of the other records."""
        source = SOURCES[self.dataset]
        pieces, odd = self._fields(table["record"].combine_chunks())
        if not pieces:
            return source.schema.empty_table(), np.flatnonzero(odd)
        rows = source.rows(join(pieces))
        odd[~odd] = strange = rows.odd | self._parted(rows)
        columns = rows.columns
        if odd.any():
            ordinary = pa.array(~strange)
            columns = {name: column.filter(ordinary) for name, column in columns.items()}
            table = table.filter(pa.array(~odd))
        return _ordinary_table(source, columns, table), np.flatnonzero(odd)

    def _fields(self, texts: pa.StringArray) -> tuple[list[Fields], Bools]:
        """Piece by piece, and which records are in none of them: one odd record costs a few others."""
        source, odd = SOURCES[self.dataset], np.zeros(len(texts), np.bool_)
        if (whole := self._alike(texts)) is not None:
            return [whole], odd
        records = texts.cast(pa.binary()).to_pylist()
        pieces, spans = [], [(start, start + PIECE) for start in range(0, len(records), PIECE)][::-1]
        while spans:
            start, stop = spans.pop()
            try:
                values = [*map(orjson.loads, records[start:stop])]
                pieces.append(source.fields(Records(values, self.columns, source.columns)))
            except (orjson.JSONDecodeError, Odd):
                if stop - start <= FEW:
                    odd[start:stop] = True
                else:
                    middle = (start + stop) // 2
                    spans += (middle, stop), (start, middle)
        return pieces, odd

    def _alike(self, texts: pa.StringArray) -> Fields | None:
        """The fields of all records, if these are of the one type that the first ones have."""
        source = SOURCES[self.dataset]
        try:
            kind = type_of(map(orjson.loads, texts[:PIECE].to_pylist()))
        except (ValueError, RecursionError):  # not JSON, of several types, nested without end
            return None
        try:
            source.fields(Columns(pa.array([], kind), self.columns, source.columns))  # Odd: not worth reading
            values = read_alike(texts, kind)
            return None if values is None else source.fields(Columns(values, self.columns, source.columns))
        except Odd:
            return None

    def _parted(self, rows: Rows) -> Bools:
        """Whether `_cut_diverging` has to look at a row."""
        if self.diverges == "drop":
            return np.zeros_like(rows.odd)
        lengths = [rows.columns[side].value_lengths().to_numpy() for side in ("chosen", "rejected")]
        several: Bools = np.maximum(*lengths) > 1
        return several

    def _one_by_one(self, table: pa.Table) -> tuple[StepOutput, list[int]]:
        """The definition: each record by itself; and which of them became rows."""
        source = SOURCES[self.dataset]
        rows, kept, failed, details, changed = [], [], [], [], 0
        for index, record in enumerate(table["record"].to_pylist()):
            try:
                row = source.parse(orjson.loads(record), self.columns)
                changed += self.diverges == "keep-common-prefix" and _cut_diverging(row)
                rows.append(row)
                kept.append(index)
            except orjson.JSONDecodeError as error:
                failed.append(index)
                line = table["source_row"][index].as_py() + 1
                details.append(record if record.startswith((TOO_LONG, NO_JSON)) else _broken_line(line, record, error))
            except Unparsable as error:
                failed.append(index)
                details.append(str(error))
        losers = table.take(pa.array(failed, pa.int64()))
        reasons = pa.repeat("unparsable", len(failed))
        dropped = dropped_rows(self.name, losers, reasons, pa.array(details, pa.string()))
        return StepOutput(_table(source, rows, table.take(pa.array(kept, pa.int64()))), dropped, changed=changed), kept


def _cut_diverging(row: dict[str, Any]) -> bool:
    """Cut the sides of a PAIRS row to the answers at which they part; whether there was anything to cut.

    The annotator compared the dialogues as wholes, so the label of an early answer is that of its dialogue.
    """
    before = row["chosen"], row["rejected"]
    row["chosen"], row["rejected"] = first_answers(*before)
    return before != (row["chosen"], row["rejected"])


def _broken_line(line: int, record: str, error: orjson.JSONDecodeError) -> str:
    if record.startswith(NOT_UTF8):
        return f"line {line}: not UTF-8"
    return f"line {line}, column {error.colno}: {error.msg}"


def _table(source: Source, rows: list[dict[str, Any]], raw: pa.Table) -> pa.Table:
    """`rows` as a table of the source's schema; `raw` has their origins."""
    columns: dict[str, Any] = {field.name: raw[field.name] for field in ORIGIN}
    hashed = [{name: row[name] for name in ID_COLUMNS if name in row} for row in rows]
    columns["id"] = pa.array(map(row_id, hashed), pa.string())
    for field in source.schema:
        if field.name not in columns:
            values = [row[field.name] for row in rows]
            columns[field.name] = _messages(values) if field.type == MESSAGES else pa.array(values, field.type)
    return pa.table(columns, schema=source.schema)


def _ordinary_table(source: Source, content: Mapping[str, pa.Array], raw: pa.Table) -> pa.Table:
    """As `_table`, of columns."""
    hashed = pl.DataFrame({name: pl.Series(content[name]) for name in ID_COLUMNS if name in content})
    columns = {field.name: raw[field.name] for field in ORIGIN} | {"id": row_ids(hashed)} | dict(content)
    missing = (field for field in source.schema if field.name not in columns)
    columns |= {field.name: pa.nulls(len(raw), field.type) for field in missing}
    return pa.table(columns, schema=source.schema)


def _messages(values: Sequence[Sequence[Turn]]) -> pa.Array:
    """A MESSAGES column built flat: several times faster than from nested Python objects."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    roles = pa.array([turn["role"] for turns in values for turn in turns], pa.string())
    contents = pa.array([turn["content"] for turns in values for turn in turns], pa.string())
    messages = pa.StructArray.from_arrays([roles, contents], fields=list(MESSAGE))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages)
