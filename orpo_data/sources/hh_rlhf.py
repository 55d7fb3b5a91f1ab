"""HH-RLHF (Anthropic/hh-rlhf): two transcripts of one dialogue, the better and the worse."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_data.schema import PAIRS
from orpo_data.sources.record import Record, Turn, Unparsable, excerpt, split_turns

SCHEMA = PAIRS
EXCLUDE = ("**/red-team-attempts/**", "**/red[-_]team[-_]attempts*")  # dialogues with ratings, no preferences
COLUMNS = {"chosen": ("chosen",), "rejected": ("rejected",)}

LABEL = re.compile(r"\n\r?\n(Human|Hum|Assistant):")  # "Hum:" is a typo that occurs upstream
ROLES = {"Human": "user", "Hum": "user", "Assistant": "assistant"}
LABELS = {"user": "Human", "assistant": "Assistant"}


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
