"""Text in a message that would be read as a control token, or as the beginning of another turn."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from orpo_data.conversations import Conversations

ControlText = Literal["drop", "escape", "flag"]

TOKEN, LABEL = "control_token_in_text", "role_label_in_text"

_ROUNDS = 3


@dataclass(frozen=True)
class Marks:
    """What no message may spell."""

    tokens: Sequence[str]  # of the tokenizer: they would become control ids
    labels: Sequence[str]  # of the template: they would begin or end a turn

    def find(self, sides: Mapping[str, Conversations]) -> dict[int, tuple[str, str]]:
        """The rows that spell a mark: the reason, and "side: mark" of the first one."""
        found: dict[int, tuple[str, str]] = {}
        if not (self.tokens or self.labels):
            return found
        known = frozenset(self.tokens)
        marks = [*self.tokens, *(label for label in self.labels if label not in known)]
        any_mark = "|".join(map(re.escape, marks))
        for side, column in sides.items():
            hit = pc.match_substring_regex(column.contents, any_mark)
            if not pc.any(hit).as_py():
                continue
            hit = pc.fill_null(hit, False)
            spelled = pl.Series(column.contents.filter(hit)).str.extract_many(marks, leftmost=True).list.first()
            rows = column.rows_of(np.flatnonzero(hit.to_numpy(zero_copy_only=False))).tolist()
            for row, mark in zip(rows, spelled.to_list(), strict=True):
                found.setdefault(row, (TOKEN if mark in known else LABEL, f"{side}: {mark.strip()}"))
        return found

    def escape(self, text: str) -> str:
        """The text with a space behind the first character of every mark; it may take several rounds."""
        for _ in range(_ROUNDS):
            before = text
            for mark in (*self.tokens, *self.labels):
                text = text.replace(mark, f"{mark[0]} {mark[1:]}")
            if text == before:
                break
        return text


def escaped(table: pa.Table, rows: Sequence[int], sides: Sequence[str], marks: Marks) -> pa.Table:
    """The same table, the messages of some of its rows escaped."""
    changed: list[dict[str, Any]] = table.take(pa.array(rows, pa.int64())).to_pylist()
    for row in changed:
        for side in sides:
            row[side] = [
                message | {"content": message["content"] and marks.escape(message["content"])}
                for message in row[side] or []
            ]
    places = np.arange(len(table))
    places[list(rows)] = len(table) + np.arange(len(rows))
    whole = pa.concat_tables([table, pa.Table.from_pylist(changed, schema=table.schema)])
    return whole.take(pa.array(places))
