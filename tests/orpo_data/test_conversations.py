"""Texts written in columns, against the same written one by one."""

import sys
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.conversations import Conversations, lay_out, write
from orpo_data.layout import Layout, Part, Roles, Slot, fill
from orpo_data.schema import MESSAGES


def column(rows: list[Any], before: int = 0) -> pa.ChunkedArray:
    """A column of messages, behind some others in the same buffers."""
    return pa.chunked_array([pa.array([*[rows[0] if rows else []] * before, *rows], MESSAGES).slice(before)])


def say(*contents: str | None) -> list[dict[str, str | None]]:
    return [{"role": "user", "content": content} for content in contents]


def test_by_hand() -> None:
    prompts = Conversations(column([say("a", "b"), say("c"), say(" d ")]))
    answers = Conversations(column([say("1"), say("2"), say(" ")]))
    assert prompts.shapes == [("user", "user"), ("user",)]
    assert prompts.shape.tolist() == [0, 1, 1]

    def find(prompt: Roles, answer: Roles) -> Layout | None:
        slots: list[Part] = [Slot(i, left=True) for i in range(len(prompt))]
        return Layout(("<", *slots, ">"), (Slot(len(prompt)), "+", slots[0]), frozenset({len(prompt)}))

    groups = lay_out(prompts, answers, find)
    assert sorted(row for group in groups for row in group.rows) == [0, 1]  # the third answer is blank
    assert write(groups, "prompt", prompts, answers).to_pylist() == ["<ab>", "<c>", ""]
    assert write(groups, "answer", prompts, answers).to_pylist() == ["1+a", "2+c", ""]


def test_rows_with_something_missing_are_not_sound() -> None:
    rows = [None, [], say(None), [{"role": None, "content": "a"}], [None], say("a", None), say("b")]
    conversations = Conversations(column(rows))
    assert conversations.sound.tolist() == [False] * 6 + [True]
    assert conversations.rows_of(conversations.starts[-1:]).tolist() == [6]
    assert Conversations(column([])).shapes == []
    whole = Conversations(column([say("c")] * len(rows)))
    layout = Layout(("<",), ("+",), frozenset())
    for sides in ((conversations, whole), (whole, conversations)):
        assert [group.rows.tolist() for group in lay_out(*sides, lambda *_: layout)] == [[6]]


def test_messages_that_lie_under_a_null_are_nobodys() -> None:
    messages = pa.array([*say("a", "b"), {"role": "system", "content": "c"}, *say(None)], MESSAGES.value_type)
    offsets, null = pa.array([0, 1, 3, 4], pa.int32()), pa.array([False, True, False])
    conversations = Conversations(pa.chunked_array([pa.ListArray.from_arrays(offsets, messages, mask=null)]))
    assert conversations.contents.to_pylist() == ["a", None]
    assert conversations.starts.tolist() == [0, 1, 1]
    assert [conversations.shapes[shape] for shape in conversations.shape] == [("user",), (), ("user",)]
    assert conversations.sound.tolist() == [True, False, False]
    assert conversations.blank.tolist() == [False, True]


def test_blank_is_what_python_strips_to_nothing() -> None:
    characters = [chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
    assert Conversations(column([say(*characters, "", " \x1c\u2003")])).blank.tolist() == [
        *(not character.strip() for character in characters),
        True,
        True,
    ]


texts = st.sampled_from(["", " ", "a", " b\n", "\x1cc\u2003", "é", "\0"]) | st.text(max_size=5)
rows = st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), st.lists(texts, min_size=1, max_size=2)), max_size=8)


@given(rows, st.integers(0, 2), st.data())
def test_writing_is_filling(drawn: list[tuple[list[str], list[str]]], before: int, data: st.DataObject) -> None:
    layouts: dict[tuple[Roles, Roles], Layout | None] = {}

    def find(*roles: Roles) -> Layout | None:
        messages = st.integers(0, len(roles[0] + roles[1]) - 1)
        parts = st.lists(
            st.text("xy", min_size=1) | st.builds(Slot, messages, st.booleans(), st.booleans()), max_size=4
        )
        asked = st.builds(Slot, st.integers(0, len(roles[0]) - 1))
        layout = st.builds(Layout, st.lists(asked).map(tuple), parts.map(tuple), st.frozensets(messages, max_size=2))
        layouts[roles] = data.draw(st.none() | layout)
        return layouts[roles]

    prompts, answers = (Conversations(column([say(*row[i]) for row in drawn], before)) for i in (0, 1))
    groups = lay_out(prompts, answers, find)
    expected: list[tuple[str, str] | None] = []
    for asked, said in drawn:
        layout = layouts[("user",) * len(asked), ("user",) * len(said)]
        holds = layout and all((asked + said)[i].strip() for i in layout.filled)
        expected.append(
            (fill(layout.prompt, asked + said), fill(layout.answer, asked + said)) if layout and holds else None
        )
    assert sorted(row for group in groups for row in group.rows) == [i for i, pair in enumerate(expected) if pair]
    for i, side in enumerate(("prompt", "answer")):
        written = write(groups, side, prompts, answers)  # type: ignore[arg-type]
        written.validate(full=True)
        assert written.to_pylist() == [pair[i] if pair else "" for pair in expected]
