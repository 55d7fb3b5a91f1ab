"""The column `flags`: what steps noticed in rows that they keep."""

from collections.abc import Collection

import numpy as np
import polars as pl
import pyarrow as pa

from orpo_data.schema import FLAG, JUDGED, PAIRS


def judged(table: pa.Table, found: pl.DataFrame, rules: Collection[str]) -> pa.Table:
    """PAIRS or JUDGED rows as JUDGED rows, with what `rules` found: columns row, rule, side, value.

    What the same rules found before is replaced, what other rules found before stays behind it.
    """
    flags = found.select("row", flag=pl.struct("rule", "side", pl.col("value").cast(pl.Float32)))
    if "flags" in table.schema.names:
        before = pl.DataFrame({"flag": pl.from_arrow(table["flags"])}).with_row_index("row").explode("flag")
        rule = pl.col("flag").struct.field("rule")
        flags = pl.concat([flags, before.filter(rule.is_not_null() & ~rule.is_in(list(rules)))])
    noise = table["label_noise"] if "label_noise" in table.schema.names else pa.nulls(len(table), pa.float32())
    columns = [*table.select(PAIRS.names).columns, _lists(flags.sort("row", maintain_order=True), len(table)), noise]
    return pa.table(columns, schema=JUDGED)


def _lists(flags: pl.DataFrame, rows: int) -> pa.Array:
    """The flags of each row of a table, from flags in the order of their rows."""
    ends = np.bincount(flags["row"], minlength=rows).cumsum()
    return pa.ListArray.from_arrays(np.insert(ends, 0, 0).astype(np.int32), arrow(flags["flag"], FLAG))


def each_row(found: pl.DataFrame, column: str, rows: int) -> pl.Series:
    """A column of findings, at most one a row, as one value for every row of a table, null where there is none."""
    return pl.repeat(None, rows, dtype=found.schema[column], eager=True).scatter(found["row"], found[column])


def rows_by_rule(found: pl.DataFrame) -> dict[str, int]:
    """How many rows each rule found something in."""
    return dict(found.group_by("rule").agg(pl.col("row").n_unique()).iter_rows())


def arrow(values: pl.Series, kind: pa.DataType) -> pa.Array:
    """A polars column as an Arrow array of one of our types."""
    return values.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(kind)
