"""From raw records to rows: JSON text in, RATED or PAIRS out."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import orjson
import pyarrow as pa
from pydantic import Field, model_validator

from orpo_data.schema import MESSAGE, MESSAGES, ORIGIN, PAIRS, pair_id, row_id
from orpo_data.sources import SOURCES, Diverging, Source, check_settings
from orpo_data.sources.files import NOT_UTF8
from orpo_data.sources.record import Turn, Unparsable, first_answers
from orpo_data.steps.step import Step, StepOutput, dropped_rows


class Parse(Step):
    """Reads each record by the rules of its upstream; a record that does not follow them is dropped as unparsable."""

    name: ClassVar[str] = "parse"
    version: ClassVar[int] = 2

    dataset: Literal["ultrafeedback", "hh-rlhf", "pairs"] = Field(description="The upstream format.")
    columns: dict[str, str] = Field(
        default={}, description="Our name of a column to the name it has in the files; dots reach into objects."
    )
    diverges: Diverging = Field(
        default="drop",
        description="Dialogues whose histories differ before the last turn: as they are, for `clean` to drop them, or "
        "each cut behind the first answer that differs, with the turns before it as the prompt.",
    )

    @model_validator(mode="after")
    def _fits_the_dataset(self) -> Self:
        check_settings(self.dataset, self.columns, self.diverges)
        return self

    def apply(self, table: pa.Table) -> StepOutput:
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
                details.append(_broken_line(table["source_row"][index].as_py() + 1, record, error))
            except Unparsable as error:
                failed.append(index)
                details.append(str(error))
        losers = table.take(pa.array(failed, pa.int64()))
        reasons = pa.repeat("unparsable", len(failed))
        dropped = dropped_rows(self.name, losers, reasons, pa.array(details, pa.string()))
        return StepOutput(_table(source, rows, table.take(pa.array(kept, pa.int64()))), dropped, changed=changed)


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
    columns["id"] = pa.array([_id(source, row) for row in rows], pa.string())
    for field in source.schema:
        if field.name not in columns:
            values = [row[field.name] for row in rows]
            columns[field.name] = _messages(values) if field.type == MESSAGES else pa.array(values, field.type)
    return pa.table(columns, schema=source.schema)


def _id(source: Source, row: dict[str, Any]) -> str:
    if source.schema is PAIRS:
        return pair_id(row["prompt"], row["chosen"], row["rejected"])
    return row_id({"prompt": row["prompt"], "completions": row["completions"]})


def _messages(values: Sequence[Sequence[Turn]]) -> pa.Array:
    """A MESSAGES column built flat: several times faster than from nested Python objects."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    roles = pa.array([turn["role"] for turns in values for turn in turns], pa.string())
    contents = pa.array([turn["content"] for turns in values for turn in turns], pa.string())
    messages = pa.StructArray.from_arrays([roles, contents], fields=list(MESSAGE))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages)
