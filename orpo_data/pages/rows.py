"""The rows of a dataset, of which pages show a few: small columns in memory, texts read only for the rows shown."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from orpo_data.batches import regrouped
from orpo_data.chain import Node
from orpo_data.manifest import Manifest
from orpo_data.mapped import let_go
from orpo_data.schema import ORIGIN_COLUMNS
from orpo_data.shards import open_shard

SMALL_COLUMNS = ("id", "reason", *ORIGIN_COLUMNS)
FEW_VALUES = cs.by_name("source", "source_file", require_all=False).as_expr()

ROWS_AT_ONCE = 50_000  # whose large columns are in memory, unless they are BATCH_BYTES together

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """`tables` are the memory-mapped shards."""

    tables: list[pa.Table]
    splits: list[str | None]

    @cached_property
    def keys(self) -> pl.DataFrame:
        """The small columns of every row, and its place, `at`."""
        found = self.frames(*[name for name in SMALL_COLUMNS if name in self.columns])
        return pl.concat(rows.with_columns(FEW_VALUES.cast(pl.Categorical)) for rows in found).with_row_index("at")

    @property
    def columns(self) -> list[str]:
        names: list[str] = self.tables[0].schema.names
        return names

    def frames(self, *columns: str) -> Iterator[pl.DataFrame]:
        """These columns of all rows, some rows at a time; what was read of the files is let go before the next."""
        tables = [table.select(list(columns)) for table in self.tables]
        yield _frame(tables[0].slice(0, 0))  # there may be no row
        yield from some_at_a_time(tables)

    def take(self, places: Iterable[int]) -> list[Row]:
        """Whole rows, with their split."""
        starts = list(accumulate((len(table) for table in self.tables), initial=0))
        found = []
        for place in places:
            shard = bisect_right(starts, place) - 1
            row = self.tables[shard].slice(place - starts[shard], 1).to_pylist()[0]
            found.append(row | {"split": self.splits[shard]})
        let_go()  # of all that was looked at to find these places, too
        return found


def read_rows(folder: Path, manifest: Manifest) -> Rows:
    """The kept rows of a dataset."""
    return _rows([(shard.split, open_shard(folder / shard.path, shard.sha256)) for shard in manifest.shards])


def read_dropped(folder: Path, manifest: Manifest) -> Rows:
    """The rows that a stage turned away."""
    return _rows([(None, open_shard(folder / shard.path, shard.sha256)) for shard in manifest.dropped])


def read_input_rows(chain: Sequence[Node]) -> Rows | None:
    """The rows of the one dataset that the last stage read, if they still lie there as they were."""
    if len(chain) < 2 or len(chain[-1].manifest.inputs) != 1:
        return None
    return read_rows(chain[-2].path, chain[-2].manifest)


def some_at_a_time(tables: Iterable[pa.Table]) -> Iterator[pl.DataFrame]:
    """The rows of memory-mapped tables, of a large one in pieces, of many small ones together."""
    for table in regrouped(tables, ROWS_AT_ONCE):
        yield _frame(table)
        let_go()


def _frame(table: pa.Table) -> pl.DataFrame:
    found = pl.from_arrow(table)
    assert isinstance(found, pl.DataFrame)
    return found


def _rows(shards: list[tuple[str | None, pa.Table]]) -> Rows:
    return Rows([table for _, table in shards], [split for split, _ in shards])
