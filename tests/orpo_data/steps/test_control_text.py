"""Marks in messages: found wherever they are spelled, whatever letters they consist of."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.conversations import Conversations
from orpo_data.schema import MESSAGES
from orpo_data.steps.control_text import LABEL, TOKEN, Marks

MARKS = st.lists(st.text("<|>[]().*+?\\^$#\n é", min_size=1, max_size=4), max_size=3)
CONTENTS = st.none() | st.text("<|>[]().*+?\\^$#\n éx", max_size=12)


def conversations(rows: list[list[str | None]]) -> Conversations:
    talks = [[{"role": "user", "content": content} for content in row] for row in rows]
    return Conversations(pa.chunked_array([pa.array(talks, MESSAGES)]))


def test_by_hand() -> None:
    marks = Marks(["<|end|>"], ["\n\nHuman:", "<|end|>"])
    prompts = conversations([["What?"], ["a", "b<|end|>", "\n\nHuman: c"], ["\n\nHuman"], ["say\n\nHuman: d"]])
    answers = conversations([["\n\nHuman: e"], ["<|end|>"], ["<|end |>", None], ["f"]])
    assert marks.find({"prompt": prompts, "chosen": answers}) == {
        0: (LABEL, "chosen: Human:"),
        1: (TOKEN, "prompt: <|end|>"),
        3: (LABEL, "prompt: Human:"),
    }


@given(MARKS, MARKS, st.lists(st.lists(CONTENTS, max_size=3), max_size=5))
def test_a_row_is_found_exactly_if_a_message_spells_a_mark(
    tokens: list[str], labels: list[str], rows: list[list[str | None]]
) -> None:
    found = Marks(tokens, labels).find({"prompt": conversations(rows)})
    spelled = [any(mark in (content or "") for content in row for mark in (*tokens, *labels)) for row in rows]
    assert sorted(found) == [row for row, spells in enumerate(spelled) if spells]
