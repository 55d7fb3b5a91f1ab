"""Conversations in columns: rows by their sequence of roles, and the texts of many rows written at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orpo_data.layout import Layout, Part, Parts, Roles
from orpo_data.ragged import cut, offsets, ranges

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Side = Literal["prompt", "answer"]

_YES = pa.scalar(True)


class Conversations:
    """A list<struct<role, content>> column."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        messages = lists.flatten()
        counts = np.where(_valid(lists), np.diff(offsets(lists)), 0)
        roles, contents = (pc.struct_field(messages, name) for name in ("role", "content"))
        self.contents: pa.StringArray = contents
        self.starts: Rows = np.cumsum(counts) - counts  # each row's first message
        self.shapes, self.shape = _shapes(roles, np.append(self.starts, len(messages)))
        self.sound: Mask = counts > 0  # there are messages, each with its role and its content
        self.sound[self.rows_of(np.flatnonzero(~(_valid(roles) & _valid(contents))))] = False
        spaces = pc.coalesce(pc.utf8_is_space(contents), _YES).to_numpy(zero_copy_only=False)
        self.blank: Mask = spaces | (np.diff(offsets(contents)) == 0)  # messages that say nothing

    def rows_of(self, messages: Rows) -> Rows:
        rows: Rows = np.searchsorted(self.starts, messages, side="right") - 1
        return rows

    def stripped(self, *, left: bool, right: bool) -> pa.StringArray:
        """The contents without what `str.strip` takes off on these sides."""
        texts = pc.utf8_ltrim_whitespace(self.contents) if left else self.contents
        return pc.utf8_rtrim_whitespace(texts) if right else texts


def _valid(column: pa.Array) -> Mask:
    valid: Mask = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else np.ones(len(column), bool)
    return valid


def _shapes(roles: pa.StringArray, bounds: Rows) -> tuple[list[Roles], Rows]:
    """The different sequences of roles, and which of them each row has."""
    coded = roles.dictionary_encode("encode")
    names = [name or "" for name in coded.dictionary.to_pylist()]
    rows = cut(coded.indices, bounds).dictionary_encode()
    shapes = [tuple(names[code] for code in np.frombuffer(row, np.int32)) for row in rows.dictionary.to_pylist()]
    return shapes, rows.indices.to_numpy().astype(np.int64)


@dataclass(frozen=True)
class Group:
    """Rows with one layout."""

    rows: Rows
    turns: int  # messages of the prompt; the layout's slots count on from them
    layout: Layout


Find = Callable[[Roles, Roles], Layout | None]


def lay_out(prompts: Conversations, answers: Conversations, find: Find) -> list[Group]:
    """The rows for which there is a layout, by their roles; `find` gives that of a prompt's and an answer's roles."""
    sound = np.flatnonzero(prompts.sound & answers.sound)
    shapes = (prompts.shape * len(answers.shapes) + answers.shape)[sound]
    keys, which, counts = np.unique(shapes, return_inverse=True, return_counts=True)
    members = np.split(sound[np.argsort(which, kind="stable")], np.cumsum(counts))
    blank = prompts.blank.any() or answers.blank.any()
    found = []
    for key, rows in zip(keys.tolist(), members[:-1], strict=True):
        asked, said = divmod(key, len(answers.shapes))
        if layout := find(prompts.shapes[asked], answers.shapes[said]):
            turns = len(prompts.shapes[asked])
            for message in layout.filled if blank else ():
                column, place = (prompts, message) if message < turns else (answers, message - turns)
                rows = rows[~column.blank[column.starts[rows] + place]]
            found.append(Group(rows, turns, layout))
    return found


def write(groups: Sequence[Group], side: Side, prompts: Conversations, answers: Conversations) -> pa.StringArray:
    """`fill` for one side of every row of the groups; the rows of no group are empty.

    The pieces of all texts are gathered in one array: a row's text is the stretch of its bytes that the row's lie in.
    """
    rows, pool, parts = len(prompts.sound), _Pool(prompts, answers), list[tuple[int, int]]()
    first, count = np.zeros(rows, np.int64), np.zeros(rows, np.int64)  # of each row's parts
    for group in groups:
        own = pool.places(group.layout.prompt if side == "prompt" else group.layout.answer, group.turns)
        first[group.rows], count[group.rows] = len(parts), len(own)
        parts += own
    counted_from, places = np.array(parts, np.int64).reshape(-1, 2)[ranges(first, count)].T
    starts = np.stack([np.zeros(rows, np.int64), prompts.starts, answers.starts])
    pieces = places + starts[counted_from, np.repeat(np.arange(rows), count)]
    texts = pool.texts().take(pa.array(pieces))
    bounds = offsets(texts)[np.append(0, np.cumsum(count))]
    return pa.StringArray.from_buffers(rows, pa.py_buffer(bounds), texts.buffers()[2])


class _Pool:
    """Literals and contents end to end, each laid there when it is first needed."""

    def __init__(self, prompts: Conversations, answers: Conversations) -> None:
        self._columns = (prompts, answers)
        self._arrays = [pa.array([], pa.string())]
        self._starts: dict[str | tuple[int, bool, bool], int] = {}
        self._size = 0

    def texts(self) -> pa.StringArray:
        return pa.concat_arrays(self._arrays)

    def places(self, parts: Parts, turns: int) -> list[tuple[int, int]]:
        """For each part its place, and before that what it is counted from: 0 the beginning, 1 the row's start in
        prompts, 2 in answers."""
        return [self._place(part, turns) for part in parts]

    def _place(self, part: Part, turns: int) -> tuple[int, int]:
        if isinstance(part, str):
            return 0, self._start(part)
        answer = part.message >= turns
        return 1 + answer, self._start((int(answer), part.left, part.right)) + part.message - answer * turns

    def _start(self, source: str | tuple[int, bool, bool]) -> int:
        if source not in self._starts:
            if isinstance(source, str):
                texts = pa.array([source], pa.string())
            else:
                column, left, right = source
                texts = self._columns[column].stripped(left=left, right=right)
            self._arrays.append(texts)
            self._starts[source] = self._size
            self._size += len(texts)
        return self._starts[source]
