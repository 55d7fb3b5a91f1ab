"""What record.py does to one record, for many at once: the ordinary ones of a file, through columns instead of a loop.

`parse` of a source is the definition, record by record. Beside it stand two functions that make the same rows of many
records. `fields` takes what is needed out of them and checks every type: of thousands that were read as columns, for
they are all of one type, or of a few dozen decoded ones, which a processor's cache holds; `rows` makes the columns of
thousands. Records that are not surely ordinary are Odd, which decides nothing: they go through `parse`, which says what
is wrong with them, if anything is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import methodcaller
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from orpo_data.ragged import ranges
from orpo_data.schema import MESSAGE
from orpo_data.sources.record import FLOAT32_MAX

NULL = type(None)
ROLE_NAMES = ("user", "assistant", "system")  # Turns hold their places here

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

Values: TypeAlias = list[Any] | pa.Array
Fields = Mapping[str, Values]
"""What a source needs of its records, by names of its own: some have a value for each record, some for each turn."""


class Odd(Exception):  # noqa: N818 - no fault: these records want to be read one by one
    """Not all of these records are of the ordinary form."""


@dataclass(frozen=True)
class Rows:
    """The content columns of many records, where not `odd`: there they hold nothing that means anything."""

    columns: Mapping[str, pa.Array]
    odd: Bools


def of_type(values: Iterable[Any], *types: type) -> list[Any]:
    """`values`, all of exactly these types (a boolean is no number); otherwise Odd."""
    found = list(values)
    if not {*map(type, found)} <= {*types}:
        raise Odd
    return found


def get(objects: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """The value of `key` in each object, null where it is missing."""
    return list(map(methodcaller("get", key), objects))


def join(pieces: Sequence[Fields]) -> Fields:
    """One piece after the other."""
    if len(pieces) == 1:
        return pieces[0]
    return {name: [*chain.from_iterable(piece[name] for piece in pieces)] for name in pieces[0]}


def texts(values: Values) -> pl.Series:
    return pl.Series(values, dtype=pl.String)


def numbers(values: Values) -> pl.Series:
    return pl.Series(values, dtype=pl.Float64)


def reached(objects: Sequence[Any], column: str) -> list[Any]:
    """`record.reach` for many objects."""
    values = get(objects, column)
    outer, _, inner = column.partition(".")
    if inner and None in values and dict in (kinds := {*map(type, within := get(objects, outer))}):
        if len(kinds) > 1:
            within = [value if type(value) is dict else {} for value in within]
        return first_of(values, reached(within, inner))
    return values


def first_of(values: list[Any], others: list[Any]) -> list[Any]:
    """Each value, or the other one where it is null."""
    if {*map(type, others)} == {NULL}:
        return values
    if {*map(type, values)} == {NULL}:
        return others
    return [new if old is None else old for old, new in zip(values, others, strict=True)]


class Found(Protocol):
    """As `record.Record`, for many records: each method gives a value a record, and raises Odd where one might fail."""

    def get(self, name: str) -> Values:
        """The first value there is under any of the names, or null."""

    def text(self, name: str) -> Values:
        """Required strings."""

    def optional_text(self, name: str) -> Values:
        """Strings or nulls."""

    def optional_number(self, name: str) -> Values:
        """Numbers that float32 can hold, or nulls."""


Defaults = Mapping[str, tuple[str, ...]]


def _names(columns: Mapping[str, str], defaults: Defaults) -> Defaults:
    return {name: (columns[name],) if name in columns else defaults[name] for name in defaults}


class Records:
    """`Found` in decoded records, as lists."""

    def __init__(self, values: Sequence[Any], columns: Mapping[str, str], defaults: Defaults) -> None:
        self._values = of_type(values, dict)
        self._names = _names(columns, defaults)

    def get(self, name: str) -> list[Any]:
        first, *others = self._names[name]
        found = reached(self._values, first)
        for column in others:
            if None in found:
                found = first_of(found, reached(self._values, column))
        return found

    def text(self, name: str) -> list[str]:
        return of_type(self.get(name), str)

    def optional_text(self, name: str) -> list[str | None]:
        return of_type(self.get(name), str, NULL)

    def optional_number(self, name: str) -> list[float | None]:
        values = of_type(self.get(name), int, float, NULL)
        if not max(map(abs, filter(None, values)), default=0) <= FLOAT32_MAX:
            raise Odd
        if int not in {*map(type, values)}:
            return values
        return [None if value is None else float(value) for value in values]


class Columns:
    """`Found` in records of one type, from `json_text.read_alike`."""

    def __init__(self, values: pa.StructArray, columns: Mapping[str, str], defaults: Defaults) -> None:
        self._values = values
        self._names = _names(columns, defaults)

    def get(self, name: str) -> pa.Array:
        found = [values for column in self._names[name] for values in _reached(self._values, column)]
        if len({values.type for values in found}) > 1:
            raise Odd
        return pc.coalesce(*found) if found else pa.nulls(len(self._values))

    def text(self, name: str) -> pa.StringArray:
        return strings(self.get(name))

    def optional_text(self, name: str) -> pa.Array:
        return optional(self.get(name), pa.string())

    def optional_number(self, name: str) -> pa.Array:
        values = optional(self.get(name), pa.float64())
        known = values.drop_null().cast(pa.float64()).to_numpy()
        if (np.abs(known) > FLOAT32_MAX).any() or np.signbit(known[known == 0]).any():  # the integer -0 is 0
            raise Odd
        return values


def _reached(values: pa.StructArray, column: str) -> Iterator[pa.Array]:
    """Where `record.reach` looks for a column, in turn, save where all is null."""
    if (found := field(values, column)).type != pa.null():
        yield found
    outer, _, inner = column.partition(".")
    if inner and pa.types.is_struct((within := field(values, outer)).type):
        yield from _reached(within, inner)


def strings(values: pa.Array) -> pa.StringArray:
    """`values`, all of them strings; otherwise Odd."""
    if values.type != pa.string():
        raise Odd
    return not_null(values)


def optional(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """`values`, which are of this type or all null; otherwise Odd."""
    if values.type not in (kind, pa.null()):
        raise Odd
    return values


def listed(values: pa.Array) -> pa.StructArray:
    """What lists hold that are all of objects or nulls, one after the other; Odd where there is anything else."""
    if not (pa.types.is_list(values.type) and pa.types.is_struct(values.type.value_type)):
        raise Odd
    return not_null(values).flatten()


def field(values: pa.Array, name: str) -> pa.Array:
    """A field of objects as JSON has them: null where it or the object is missing; Odd where there is anything else."""
    if values.type == pa.null():
        return values
    if not pa.types.is_struct(values.type):
        raise Odd
    place = values.type.get_field_index(name)
    return values.field(place) if place >= 0 else pa.nulls(len(values))


def not_null(values: pa.Array) -> pa.Array:
    """`values`, none of which is null; otherwise Odd."""
    if values.null_count:
        raise Odd
    return values


@dataclass(frozen=True)
class Turns:
    """Some turns for each row: those of row i are `lengths[i]` places of the flat columns, from `starts[i]` on."""

    roles: Ints
    contents: pl.Series
    starts: Ints
    lengths: Ints

    @classmethod
    def flat(cls, roles: Ints, contents: pl.Series, lengths: Ints) -> Self:
        """Rows that lie one behind the other."""
        return cls(roles, contents, np.cumsum(lengths) - lengths, lengths)

    @classmethod
    def from_arrow(cls, column: pa.ListArray) -> Self:
        """Of a MESSAGES column."""
        roles, contents = column.flatten().flatten()
        places = pc.index_in(roles, pa.array(ROLE_NAMES)).to_numpy()
        return cls.flat(places, pl.Series(contents), column.value_lengths().to_numpy())

    @classmethod
    def every(cls, role: str, contents: pl.Series) -> Self:
        """One turn a row."""
        return cls.flat(np.full(len(contents), ROLE_NAMES.index(role)), contents, np.ones(len(contents), np.int64))

    def where(self, wanted: Bools) -> "Turns":
        """The turns of some rows, none in the others."""
        return Turns(self.roles, self.contents, self.starts, np.where(wanted, self.lengths, 0))

    def part(self, first: Ints | int, lengths: Ints) -> "Turns":
        """`lengths` turns of each row from its turn `first` on."""
        return Turns(self.roles, self.contents, self.starts + first, lengths)

    def rows(self, rows: slice) -> "Turns":
        return Turns(self.roles, self.contents, self.starts[rows], self.lengths[rows])

    def first_is(self, role: str) -> Bools:
        """Whether a row has turns and the first is of `role`."""
        found = self.lengths > 0
        found[found] = self.roles[self.starts[found]] == ROLE_NAMES.index(role)
        return found

    def __add__(self, other: "Turns") -> "Turns":
        """Row by row the turns of both, one after the other."""
        roles, contents = np.concatenate((self.roles, other.roles)), pl.concat((self.contents, other.contents))
        starts = np.stack((self.starts, other.starts + len(self.roles)), axis=1).ravel()
        lengths = np.stack((self.lengths, other.lengths), axis=1).ravel()
        index = ranges(starts, lengths)
        return Turns.flat(roles[index], contents[index], self.lengths + other.lengths)

    def under(self, system: pl.Series) -> "Turns":
        """With the texts of `system` as first turns, where these are not null, not empty, and there is none yet."""
        wanted = (system.fill_null("") != "").to_numpy() & ~self.first_is("system")
        return Turns.every("system", system).where(wanted) + self if wanted.any() else self

    def to_arrow(self) -> pa.ListArray:
        """As a MESSAGES column."""
        index = ranges(self.starts, self.lengths)
        roles = pa.array(ROLE_NAMES).take(pa.array(self.roles[index]))
        messages = pa.StructArray.from_arrays([roles, to_arrow(self.contents[index])], fields=list(MESSAGE))
        return lists(messages, self.lengths)


def lists(flat: pa.Array, lengths: Ints) -> pa.ListArray:
    """A list column whose rows are `lengths` values of `flat`, one behind the other."""
    return pa.ListArray.from_arrays(pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32()), flat)


def to_arrow(column: pl.Series) -> pa.Array:
    """A column as Arrow's plain one: of texts, string."""
    plain = column.to_arrow(compat_level=pl.CompatLevel.oldest())
    return plain.cast(pa.string()) if column.dtype == pl.String else plain


def split_turns_of_many(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """`split_turns` for many rows: (prompt, chosen, rejected)."""
    limit = np.maximum(np.minimum(chosen.lengths, rejected.lengths) - 1, 0)
    ours, theirs = ranges(chosen.starts, limit), ranges(rejected.starts, limit)
    same = (chosen.contents[ours] == rejected.contents[theirs]).to_numpy()
    same = same & (chosen.roles[ours] == rejected.roles[theirs])
    turn = ranges(np.zeros_like(limit), limit)  # which one of its row
    shared = limit.copy()
    np.minimum.at(shared, np.repeat(np.arange(len(limit)), limit)[~same], turn[~same])
    return (
        chosen.part(0, shared),
        chosen.part(shared, chosen.lengths - shared),
        rejected.part(shared, rejected.lengths - shared),
    )
