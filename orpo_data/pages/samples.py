"""Rows to look at: a fixed choice of those kept, of those dropped for each reason, flagged by each rule, or changed.

Ids are content hashes, so the rows with the smallest ids are a random choice that is the same on every machine.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import polars as pl

from orpo_data.pages.charts import Numbers
from orpo_data.pages.measures import Places
from orpo_data.pages.rows import Row, Rows
from orpo_data.schema import ORIGIN_COLUMNS
from orpo_data.steps.tokens import among, distinct

ROWS = 36
ROWS_PER_REASON = 3
ROWS_PER_RULE = 2
MOST_OVERLAPS = 100
CONTAMINATED = "contaminated"  # how the reasons of decontamination begin
EXTREMES = 3
WINDOW = 1_000  # rows among which examples are looked for at a time
MOST_FIELDS = 12
CONTEXT = 80  # characters around a change
MOST_SOURCES = 12

SHOWN_ELSEWHERE = {"id", *ORIGIN_COLUMNS, "subset", "split"}
"""Columns of a dropped row that stand in its heading."""

ROW_ID = re.compile(r"\b[0-9a-f]{32}\b")


def random_rows(rows: Rows) -> list[Row]:
    """As many of each source, by source."""
    counts = rows.keys["source"].value_counts().sort("count", "source", descending=[True, False])
    sources = counts["source"].to_list()[:MOST_SOURCES]
    each = max(1, ROWS // max(1, len(sources)))
    chosen = [_first(rows.keys.filter(pl.col("source").eq_missing(source)), each) for source in sources]
    return [row for places in chosen for row in rows.take(places)]


def extreme_rows(rows: Rows, values: Numbers, *, highest: bool) -> list[Row]:
    """The rows with the highest, or the lowest, of `values`, which are those of each row in turn."""
    known = rows.keys.with_columns(value=pl.Series(values)).filter(pl.col("value").is_finite())
    by_value = known.lazy().sort("value", "id", "at", descending=[highest, False, False])
    return rows.take(by_value.head(EXTREMES).collect()["at"])


def flagged_rows(rows: Rows, places: Mapping[str, Places]) -> dict[str, list[Row]]:
    """Some rows for each rule, of those in `places` that it flagged."""
    return {rule: rows.take(_first(rows.keys[found], ROWS_PER_RULE)) for rule, found in places.items()}


def _first(keys: pl.DataFrame, most: int) -> list[int]:
    """The places of the rows with the smallest ids; lazily, since the few first are found without sorting the rest."""
    return keys.lazy().sort("id", "at", nulls_last=True).head(most).collect()["at"].to_list()


def texts_of(source: Rows | None, rows: list[Row]) -> dict[str, Row]:
    """The text rows that tokenized `rows` were made of, by id; none if `source` is not there."""
    if source is None or "prompt" not in source.columns:
        return {}
    shown = [row["id"] for row in rows]
    hits = [ids["id"].is_in(shown) for ids in source.frames("id")]  # the keys of all rows would take much memory
    return {row["id"]: row for row in source.take(pl.concat(hits).arg_true())}


Excerpt = tuple[str, str, str]
"""What stands before a place, what stands there, and what stands behind it."""


@dataclass(frozen=True)
class Edit:
    """Where the text of one part of a row differs, before and after."""

    part: str
    before: Excerpt
    after: Excerpt


@dataclass(frozen=True)
class Change:
    """A row before and after the stage that changed its text."""

    before: Row
    after: Row

    @property
    def edits(self) -> list[Edit]:
        texts = {
            part: (as_text(self.before[part]), as_text(self.after[part])) for part in ("prompt", "chosen", "rejected")
        }
        return [Edit(part, *_difference(*both)) for part, both in texts.items() if both[0] != both[1]]


def _difference(before: str, after: str) -> tuple[Excerpt, Excerpt]:
    """Both texts from the first to the last character that differs, with some of what is the same around them."""
    start = _shared(before, after)
    same_end = _shared(before[start:][::-1], after[start:][::-1])
    ends = [len(text) - same_end for text in (before, after)]
    first, second = (
        (text[max(0, start - CONTEXT) : start], visible(text[start:end][:CONTEXT]), text[end : end + CONTEXT])
        for text, end in zip((before, after), ends, strict=True)
    )
    return first, second


def _shared(first: str, second: str) -> int:
    """Characters that two texts have in common at their beginning."""
    differs = (place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(differs, min(len(first), len(second)))


def visible(text: str) -> str:
    """A text whose characters can all be seen: what has no shape of its own is written as <U+200B>."""
    shapeless = (unicodedata.category(c)[0] in "CM" and c != "\n" for c in text)
    return "".join(f"<U+{ord(c):04X}>" if hide else c for c, hide in zip(text, shapeless, strict=True))


def changed_rows(rows: Rows, source: Rows | None) -> list[Change]:
    """Some rows whose content differs from that of the one row of the same origin in `source`, which the stage read."""
    if source is None or not all({"chosen", *ORIGIN_COLUMNS} <= {*side.columns} for side in (rows, source)):
        return []
    after, before = (side.keys["id"].hash().to_numpy() for side in (rows, source))
    changed = rows.keys.filter(~among(after, distinct(before))).select("id", "at").sort("id", "at")
    found: list[tuple[int, int]] = []
    for window in changed.iter_slices(WINDOW):  # the first has enough as a rule; to join all rows takes much memory
        ours = _alone(rows, rows.keys[window["at"]])
        pairs = ours.join(_alone(source, ours), on=list(ORIGIN_COLUMNS), suffix="_before").sort("id", "at")
        found += pairs.select("at_before", "at").iter_rows()
        if len(found) >= EXTREMES:
            break
    first, second = ([pair[side] for pair in found[:EXTREMES]] for side in (0, 1))
    return [Change(*change) for change in zip(source.take(first), rows.take(second), strict=True)]


def _alone(rows: Rows, like: pl.DataFrame) -> pl.DataFrame:
    """The rows with an origin of those of `like` that no other row has."""
    found = rows.keys.join(like, on=list(ORIGIN_COLUMNS), how="semi")
    return found.filter(pl.struct(ORIGIN_COLUMNS).is_unique())


@dataclass(frozen=True)
class DroppedRow:
    """A row that a step turned away, and the kept row that its detail names, if any."""

    row: Row
    fields: dict[str, str]
    beside: dict[str, str] | None


def dropped_rows(dropped: Rows, reasons: Iterable[str], kept: Rows) -> dict[str, list[DroppedRow]]:
    """Some dropped rows of each reason."""
    found = {}
    for reason in reasons:
        keys = dropped.keys.filter(pl.col("reason") == reason).sort("id", *ORIGIN_COLUMNS, "at", nulls_last=True)
        losers = dropped.take(keys["at"].head(ROWS_PER_REASON))
        found[reason] = [DroppedRow(row, fields(row["row"]), _named_by(row, kept, dropped)) for row in losers]
    return found


@dataclass(frozen=True)
class Overlap:
    """A row that shares text with an evaluation set, and what it shares."""

    row: Row
    prompt: str
    detail: str


def overlaps(dropped: Rows) -> list[Overlap]:
    """The rows that were removed for what they share with evaluation sets, by origin, MOST_OVERLAPS at most."""
    keys = dropped.keys.filter(pl.col("reason").str.starts_with(CONTAMINATED)).sort(*ORIGIN_COLUMNS, "at")
    found = dropped.take(keys["at"].head(MOST_OVERLAPS))
    return [Overlap(row, fields(row["row"]).get("prompt", ""), row["detail"] or "") for row in found]


def _named_by(row: Row, kept: Rows, dropped: Rows) -> dict[str, str] | None:
    """The other row whose id stands in the detail, kept or dropped in its turn."""
    for row_id in ROW_ID.findall(row["detail"] or ""):
        for rows in (kept, dropped) if row_id != row["id"] else ():
            for other in rows.take(rows.keys.filter(pl.col("id") == row_id)["at"].head(1)):
                return fields(other["row"]) if rows is dropped else _as_fields(other)
    return None


def fields(text: str) -> dict[str, str]:
    """What a dropped row held, by column; the text as it is when it is no JSON object."""
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError:
        row = None
    return _as_fields(row) if isinstance(row, dict) else {"record": text}


def _as_fields(row: Row) -> dict[str, str]:
    shown = {name: value for name, value in row.items() if value not in (None, []) and name not in SHOWN_ELSEWHERE}
    return {name: as_text(value) for name, value in list(shown.items())[:MOST_FIELDS]}


def as_text(value: Any) -> str:
    """A conversation as lines `role: content`, token ids as their number; anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return "\n".join(f"{turn.get('role')}: {turn['content']}" for turn in value)
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return f"{len(value):,} ids"
    return orjson.dumps(value).decode()
