"""Upstream formats, one file each: the schema of its rows, files never read, its columns, and how rows are parsed."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import pyarrow as pa

from orpo_data.errors import OrpoError
from orpo_data.schema import PAIRS
from orpo_data.sources import hh_rlhf, pairs, ultrafeedback
from orpo_data.sources.columns import Fields, Found, Rows
from orpo_data.sources.record import MissingColumn, Unparsable, column_list, excerpt, has_column


@dataclass(frozen=True)
class Source:
    """An upstream format."""

    schema: pa.Schema  # RATED or PAIRS
    exclude: tuple[str, ...]  # globs of file names that are never read
    columns: Mapping[str, tuple[str, ...]]  # our name of a column -> the upstream's names for it, tried in turn
    parse: Callable[[Any, Mapping[str, str]], dict[str, Any]]
    """From one JSON value, and the names of columns that differ from `columns`, to the content columns of a row (all
    but id and origin). Raises Unparsable where the value is not what the source promises, and nothing else."""
    fields: Callable[[Found], Fields]
    """What `rows` needs of some records, found under the names of `columns`. Raises Odd where they want to be parsed
    one by one."""
    rows: Callable[[Fields], Rows]
    """`parse` for many, from their fields."""


SOURCES = {
    name: Source(kind.SCHEMA, kind.EXCLUDE, kind.COLUMNS, kind.parse, kind.fields, kind.rows)
    for name, kind in (("ultrafeedback", ultrafeedback), ("hh-rlhf", hh_rlhf), ("pairs", pairs))
}


Diverging = Literal["drop", "keep-common-prefix"]
"""What becomes of two dialogues whose histories differ before the last turn."""


def check_settings(dataset: str, columns: Mapping[str, str], diverges: Diverging) -> None:
    """Raises ValueError for a key of `columns` that the source does not know, or a `diverges` that cannot apply."""
    check_column_names(dataset, columns)
    if diverges != "drop" and SOURCES[dataset].schema != PAIRS:
        raise ValueError(f"diverges: {dataset} has no dialogues that could part, leave it out")


def check_column_names(dataset: str, columns: Mapping[str, str]) -> None:
    """Raises ValueError for a key of `columns` that the source does not know, naming the nearest one it does."""
    known = SOURCES[dataset].columns
    for key in columns:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ValueError(f"columns: unknown key {key!r} for {dataset}, did you mean {nearest!r}?")


def require_columns(dataset: str, record: str, columns: Mapping[str, str], file_name: str) -> bool:
    """Check the columns of a file by one record (JSON text); ask with the next one as long as it cannot tell (False).

    A column that is not there stops the stage: it would cost every row.

    Raises:
        OrpoError: a column that the source needs, or that `columns` names, is missing.
    """
    try:
        value = orjson.loads(record)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(value, dict):
        return False
    missing = [column for column in columns.values() if not has_column(value, column)]
    problem = f"no column {excerpt(missing[0])}, found: {column_list(value)}" if missing else None
    try:
        SOURCES[dataset].parse(value, columns)
    except MissingColumn as error:
        problem = str(error)
    except Unparsable:
        pass  # costs this row alone
    if problem:
        raise OrpoError(f"{file_name}: {problem}; say in the recipe under `columns:` what it is called here")
    return True
