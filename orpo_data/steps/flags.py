"""The column `flags`: what steps noticed in rows that they keep."""

from collections.abc import Collection

import polars as pl
import pyarrow as pa

from orpo_data.schema import JUDGED, PAIRS


def judged(table: pa.Table, found: pl.DataFrame, rules: Collection[str]) -> pa.Table:
    """PAIRS or JUDGED rows as JUDGED rows, with what `rules` found: columns row, rule, side, value.

    What the same rules found before is replaced, what other rules found before stays behind it.
    """
    flags = found.select("row", flag=pl.struct("rule", "side", pl.col("value").cast(pl.Float32)))
    if "flags" in table.schema.names:
        before = pl.DataFrame({"flag": pl.from_arrow(table["flags"])}).with_row_index("row").explode("flag")
        rule = pl.col("flag").struct.field("rule")
        flags = pl.concat([flags, before.filter(rule.is_not_null() & ~rule.is_in(list(rules)))])
    column = each_row(flags.group_by("row", maintain_order=True).agg("flag"), "flag", len(table)).fill_null([])
    noise = table["label_noise"] if "label_noise" in table.schema.names else pa.nulls(len(table), pa.float32())
    pairs = table.select(PAIRS.names).append_column("flags", arrow(column, JUDGED.field("flags").type))
    return pairs.append_column("label_noise", noise).cast(JUDGED)


def each_row(found: pl.DataFrame, column: str, rows: int) -> pl.Series:
    """A column of findings, at most one a row, as one value for every row of a table, null where there is none."""
    every = pl.select(row=pl.int_range(rows, dtype=pl.UInt32))
    return every.join(found.select("row", column), on="row", how="left", maintain_order="left")[column]


def rows_by_rule(found: pl.DataFrame) -> dict[str, int]:
    """How many rows each rule found something in."""
    return dict(found.group_by("rule").agg(pl.col("row").n_unique()).iter_rows())


def arrow(values: pl.Series, kind: pa.DataType) -> pa.Array:
    """A polars column as an Arrow array of one of our types."""
    return values.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(kind)
