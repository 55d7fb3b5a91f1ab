"""Rules over a table of pairs: every rule looks at the columns of all rows at once."""

from collections.abc import Sequence

import polars as pl

from orpo_data.schema import ANSWERS
from orpo_data.steps.rules.rule import Rule

FINDINGS = pl.Schema(
    {
        "row": pl.UInt32,
        "rule": pl.String,
        "action": pl.String,
        "side": pl.String,  # prompt, chosen, rejected or both
        "value": pl.Float32,  # of both answers chosen's
        "detail": pl.String,
    }
)


def judge(rules: Sequence[Rule], rows: pl.LazyFrame) -> pl.DataFrame:
    """All that fails of `rows_to_judge` as FINDINGS, rule by rule."""
    sides = {f"{rule.name} of {side}": (rule, side) for rule in rules for side in rule.sides}
    figures = rows.select(**{name: rule.measure(side) for name, (rule, side) in sides.items()})
    fails = {_fails(name): rule.fails(pl.col(name)) for name, (rule, _) in sides.items()}
    failing = figures.with_row_index("row").with_columns(**fails).filter(pl.any_horizontal(*fails)).collect()
    found = {name: _finding(name, *sides[name]) for name in sides if failing[_fails(name)].any()}
    return _merged(failing.select("row", **found)) if found else FINDINGS.to_frame()


def _fails(name: str) -> str:
    return f"{name} fails"


def _finding(name: str, rule: Rule, side: str) -> pl.Expr:
    """What a rule says of one side, null where it does not fail."""
    figure = pl.col(name)
    finding = pl.struct(
        rule=pl.lit(rule.name),
        action=pl.lit(rule.action),
        side=pl.lit(side),
        value=rule.value(figure).cast(pl.Float32),
        words=rule.words(figure),
        limit=pl.lit(f" {rule.limit}" if rule.limit else ""),
    )
    return pl.when(_fails(name)).then(finding)


def _merged(found: pl.DataFrame) -> pl.DataFrame:
    """One column of findings for each rule and side as FINDINGS: what a rule says of both answers becomes one."""
    findings = found.unpivot(index="row", value_name="found").drop_nulls("found")
    answer, side, words = pl.col("side").is_in(ANSWERS), pl.col("side"), pl.col("words")
    return (
        findings.select("row", pl.col("found").struct.unnest())
        .group_by("row", "rule", answer.alias("answer"), maintain_order=True)
        .agg(
            pl.first("action", "value", "limit"),
            side=pl.when(pl.len() == 2).then(pl.lit("both")).otherwise(pl.first("side")),
            words=words.str.join(" and "),
        )
        .with_columns(detail=pl.when(words != "").then(side + ": " + words + pl.col("limit")).otherwise(side))
        .select(FINDINGS.names())
    )
