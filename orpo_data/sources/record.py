"""Reading values out of one raw record; what is wrong with it is said in terms of its own columns."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Turn = dict[str, str]
"""{"role": "user", "content": "..."}"""

FLOAT32_MAX = float(np.finfo(np.float32).max)
SHOWN_CHARACTERS, SHOWN_COLUMNS = 40, 20  # of a value, of a record: a message is one line whatever the record holds
JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


class Unparsable(Exception):  # noqa: N818 - a verdict on the row, as its drop reason is called
    """This record is not what the source promises; the message says where."""


class MissingColumn(Unparsable):
    """A column that every record needs is not there."""


def json_name(value: object) -> str:
    """What `value` is in JSON's terms, e.g. "a list"."""
    return JSON_NAMES.get(type(value), "a number")


def excerpt(value: str) -> str:
    """The beginning of a text in quotes, on one line."""
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "...")


def column_list(names: Iterable[str]) -> str:
    """The columns of a record for a message."""
    shown = [name if name.isprintable() and len(name) <= SHOWN_CHARACTERS else excerpt(name) for name in names]
    more = [f"{len(shown) - SHOWN_COLUMNS} more"] if len(shown) > SHOWN_COLUMNS else []
    return ", ".join(shown[:SHOWN_COLUMNS] + more) or "none"


def has_column(record: Mapping[str, Any], column: str) -> bool:
    """Whether `column` is there, null included; a dotted name reaches into objects."""
    outer, _, inner = column.partition(".")
    if column in record or not inner:
        return column in record
    return outer in record and (not isinstance(record[outer], dict) or has_column(record[outer], inner))


def reach(record: Mapping[str, Any], column: str) -> Any:
    """The value of `column`, null where it is missing; a dotted name reaches into objects."""
    if (value := record.get(column)) is not None:
        return value
    outer, _, inner = column.partition(".")
    return reach(record[outer], inner) if inner and isinstance(record.get(outer), dict) else None


class Record:
    """A raw record seen through the names that a source gives its columns.

    `defaults` has for each of our names the upstream's names for it, tried in turn; `columns` (from the recipe)
    overrides them.
    """

    def __init__(self, value: Any, columns: Mapping[str, str], defaults: Mapping[str, tuple[str, ...]]) -> None:
        if not isinstance(value, dict):
            raise Unparsable(f"the record is {json_name(value)}, not an object")
        self._value = value
        self._columns = columns
        self._defaults = defaults

    def names(self, name: str) -> tuple[str, ...]:
        """The upstream's names for our column `name`."""
        return (self._columns[name],) if name in self._columns else self._defaults[name]

    def get(self, name: str) -> Any:
        """The first value there is under any of the names, or null."""
        for column in self.names(name):
            if (value := reach(self._value, column)) is not None:
                return value
        return None

    def require(self, name: str) -> Any:
        """As `get`; raises MissingColumn where there is none, Unparsable where it is null."""
        if (value := self.get(name)) is None:
            if any(has_column(self._value, column) for column in self.names(name)):
                raise Unparsable(f"column {self.names(name)[0]!r} is null")
            wanted = " or ".join(repr(column) for column in self.names(name))
            raise MissingColumn(f"no column {wanted}, found: {column_list(self._value)}")
        return value

    def text(self, name: str) -> str:
        """A required string."""
        return text(self.require(name), f"column {self.names(name)[0]!r}")

    def optional_text(self, name: str) -> str | None:
        """A string or null."""
        value = self.get(name)
        return None if value is None else text(value, f"column {self.names(name)[0]!r}")

    def optional_number(self, name: str) -> float | None:
        """A number that float32 can hold, or null."""
        value = self.get(name)
        return None if value is None else number(value, f"column {self.names(name)[0]!r}")


def text(value: object, where: str) -> str:
    """`value` if it is a string, otherwise Unparsable naming `where`."""
    if not isinstance(value, str):
        raise Unparsable(f"{where} is {json_name(value)}, not a string")
    return value


def number(value: object, where: str) -> float:
    """`value` if it is a number that float32 can hold, otherwise Unparsable naming `where`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unparsable(f"{where} is {json_name(value)}, not a number")
    if not abs(value) <= FLOAT32_MAX:  # NaN neither
        raise Unparsable(f"{where} is {excerpt(str(value))[1:-1]}, too large for a score")
    return float(value)


def split_turns(chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """(prompt, chosen, rejected): the turns that both begin with, and what each side says after them.

    Each side keeps at least its last turn, so two dialogues with one history leave one answer a side, and dialogues
    whose histories part early keep several turns. Only whole turns are shared: an opening that two answers have in
    common stays part of both.
    """
    limit = max(0, min(len(chosen), len(rejected)) - 1)
    shared = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def first_answers(chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """The first turn of each side alone, where these are two different answers of the assistant; else both as they are.

    For dialogues whose histories part early: what follows the answers at which they part answers different questions.
    """
    first = chosen[:1], rejected[:1]
    if first[0] != first[1] and all(side and side[0]["role"] == "assistant" for side in first):
        return first
    return chosen, rejected
