"""HH-RLHF (Anthropic/hh-rlhf): two transcripts of one dialogue, the better and the worse."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from orpo_data.schema import PAIRS
from orpo_data.sources.columns import Bools, Fields, Found, Rows, Turns, split_turns_of_many, texts
from orpo_data.sources.record import Record, Turn, Unparsable, excerpt, split_turns

SCHEMA = PAIRS
EXCLUDE = ("**/red-team-attempts/**", "**/red[-_]team[-_]attempts*")  # dialogues with ratings, no preferences
COLUMNS = {"chosen": ("chosen",), "rejected": ("rejected",)}

LABEL = re.compile(r"\n\r?\n(Human|Hum|Assistant):")  # "Hum:" is a typo that occurs upstream
ROLES = {"Human": "user", "Hum": "user", "Assistant": "assistant"}
LABELS = {"user": "Human", "assistant": "Assistant"}

MARK = "\x1e"  # ASCII's record separator: parts turns below, so a transcript that holds one is read by itself
MARKS = {f"\n{cr}\n{label}:": MARK + role[0] for label, role in ROLES.items() for cr in ("", "\r")}
"""LABEL spelled out: what each label becomes while many transcripts are cut at once. No two can overlap."""

WHITE_SPACE = "".join(map(chr, [*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)]))
WHITE_SPACE += "\u2028\u2029\u202f\u205f\u3000"
"""What `str.strip` takes off: four control characters more than Unicode's White_Space, which polars takes off."""

PART, TRANSCRIPT = pl.col("part"), pl.col("transcript")
PARTS = (
    TRANSCRIPT.str.replace_many([*MARKS], [*MARKS.values()]).str.split(MARK).alias("part"),
    TRANSCRIPT.str.contains(MARK, literal=True).alias("has_mark"),
)
JUDGED = (
    PART.list.len().cast(pl.Int64).alias("count"),  # one is the text before the first label, which is passed over
    # a label at the very beginning, which needs no blank line, is such text here
    (pl.col("has_mark") | (PART.list.len() < 2) | (PART.list.first().str.strip_chars(WHITE_SPACE) != "")).alias("odd"),
)
SAID = (
    PART.str.starts_with("a").alias("is_assistant"),
    PART.str.slice(1).str.strip_chars(WHITE_SPACE).alias("content"),
)


def parse_transcript(transcript: str) -> list[Turn]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", roles as they come.

    A label counts only after a blank line or at the very beginning; elsewhere it is part of what was said. White space
    around a turn is the transcript's layout and is taken off; blank lines inside a turn stay.

    Raises:
        Unparsable: no label at all, or text before the first one.
    """
    before, *parts = LABEL.split("\n\n" + transcript)
    if not parts:
        raise Unparsable(f"no 'Human:' or 'Assistant:' label in {excerpt(transcript)}")
    if before.strip():
        raise Unparsable(f"text before the first label: {excerpt(before.strip())}")
    return [
        {"role": ROLES[label], "content": content.strip()}
        for label, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def format_transcript(turns: Sequence[Turn]) -> str:
    """The transcript of user and assistant turns, in the layout that almost every published one has.

    A transcript is well-formed when it is nothing but turns of a blank line, "Human" or "Assistant", a colon, one
    space, and text with no white space at its ends and no label after a blank line inside it (an empty turn ends with
    the space). Parsing a well-formed transcript and formatting its turns gives it back byte for byte.
    """
    return "".join(f"\n\n{LABELS[turn['role']]}: {turn['content']}" for turn in turns)


def parse(record: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """The content columns of a PAIRS row; raises Unparsable."""
    fields = Record(record, columns, COLUMNS)
    prompt, chosen, rejected = split_turns(_side(fields, "chosen"), _side(fields, "rejected"))
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": None,
        "score_rejected": None,
        "model_chosen": None,
        "model_rejected": None,
        "system_chosen": None,
        "system_rejected": None,
        "subset": None,
    }


def _side(fields: Record, name: str) -> list[Turn]:
    transcript = fields.text(name)
    try:
        return parse_transcript(transcript)
    except Unparsable as error:
        raise Unparsable(f"{name}: {error}") from None


def fields(found: Found) -> Fields:
    """The transcripts of many records; raises Odd."""
    return {side: found.text(side) for side in ("chosen", "rejected")}


def rows(fields: Fields) -> Rows:
    """`parse` for many."""
    turns, odd = turns_of_many(pl.concat([texts(fields["chosen"]), texts(fields["rejected"])]))
    count = len(fields["chosen"])
    prompt, chosen, rejected = split_turns_of_many(turns.rows(slice(count)), turns.rows(slice(count, None)))
    sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return Rows({name: side.to_arrow() for name, side in sides.items()}, odd[:count] | odd[count:])


def turns_of_many(transcripts: pl.Series) -> tuple[Turns, Bools]:
    """`parse_transcript` for many, and which of them it must see itself."""
    cut = pl.LazyFrame({"transcript": transcripts}).select(PARTS).select("part", *JUDGED).collect()
    said = cut.select(pl.col("part").explode()).select(SAID)
    lengths = cut["count"].to_numpy()
    roles = said["is_assistant"].to_numpy().astype(np.int64)
    return Turns.flat(roles, said["content"], lengths).part(1, lengths - 1), cut["odd"].to_numpy()
