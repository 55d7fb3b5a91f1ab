"""What the command line prints of lineage and of comparisons: for people, and as plain JSON values for scripts."""

from collections.abc import Sequence
from typing import Any

import polars as pl
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orpo_data.chain import Node, record_name
from orpo_data.comparison import Diff, Move
from orpo_data.distributions import NAMES, Shift
from orpo_data.history import Decision, Lineage, Origin, RowLineage, Verdict
from orpo_data.pages.render import figure, percent
from pipelines.console import out
from pipelines.printable import printable


def print_lineage(chain: Lineage) -> None:
    """The way of each row asked for, or where the rows of a file ended, or else the stages from the raw files on."""
    for row in chain.rows:
        _print_row(row)
    if not chain.rows and chain.ends is not None:
        _print_ends(chain.ends)
    if chain.rows or chain.ends is not None:
        for node in chain.nodes:
            if not node.sound:
                out.print(
                    f"[red]{escape(str(node.path))}: {CHANGED}; what is told of it may be another version's[/red]"
                )
        return
    for node in chain.nodes:
        _print_node(node)


CHANGED = "changed since the next stage read it"


def _print_node(node: Node) -> None:
    note = "" if node.sound else f"  [red]({CHANGED})[/red]"
    out.print(f"[bold]{node.manifest.stage}[/bold]  {escape(str(node.path))}  {node.manifest.content_hash[:12]}{note}")
    for item in node.manifest.inputs:
        if item.path is None:
            revision = f" at {item.revision}" if item.revision else ""
            kind = "base model" if node.manifest.stage == "train" else "raw file"
            out.print(f"  {kind} {escape(item.name)}{revision}  sha256 {item.fingerprint[:12]}")
    for step in node.manifest.steps:
        reasons = "".join(f", {count:,} {reason}" for reason, count in step.dropped.items())
        out.print(f"  {step.step} v{step.version}: {step.rows_in:,} in, {step.rows_out:,} out{reasons}")


def _print_row(row: RowLineage, indent: str = "") -> None:
    place = printable(f"  from {_place(row.origin)}")
    out.print(Text(f"{indent}{row.id or 'no id'}", "bold").append(place, "not bold"))
    for decision in row.decisions:
        out.print(Text(f"{indent}  {_outcome(decision)}", "" if decision.kept else "red"), soft_wrap=True)
        for verdict in decision.steps:
            out.print(Text(printable(f"{indent}    {_verdict(verdict)}")), soft_wrap=True)
    for other in row.related:
        out.print(Text(f"{indent}  the row named above:"))
        _print_row(other, f"{indent}    ")


def _place(origin: Origin) -> str:
    return f"{origin.source}: {origin.file} {record_name(origin.file, origin.row)}"


def _outcome(decision: Decision) -> str:
    if decision.kept:
        return f"{decision.stage}: kept{f' in {decision.split}' if decision.split else ''} as {decision.id}"
    return f"{decision.stage}: dropped by {decision.step}: {decision.reason}"


def _verdict(verdict: Verdict) -> str:
    """One step: kept or why not, and the values that decided."""
    detail = f" ({verdict.detail})" if verdict.detail else ""
    verdict_text = "kept" if verdict.kept else f"{verdict.reason}{detail}"
    values = "".join(f", {name} {_value(value)}" for name, value in verdict.values.items())
    return f"{verdict.step}: {verdict_text}{values}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(_value(item) for item in value.values() if item is not None)
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, list) else str(value)


def _print_ends(ends: pl.DataFrame) -> None:
    """One line a row, below the number of rows of each end; plain text, since a file may have any number of them."""
    rows = ends.to_dicts()
    counts: dict[str, int] = {}
    for row in rows:
        counts[_end(row)] = counts.get(_end(row), 0) + 1
    print(_rows(len(rows)))
    for end, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {count:,} {end}")
    print(f"\n{'line':>8}  {'id':12}  end")
    for row in rows:
        detail = f" ({' '.join(row['detail'].split())})" if row["detail"] else ""
        print(printable(f"{row['source_row'] + 1:>8}  {(row['id'] or '-')[:12]:12}  {_end(row)}{detail}"))


def _end(row: dict[str, Any]) -> str:
    if row["step"] is None:
        return f"kept in {row['split']}" if row["split"] else f"kept by {row['stage']}"
    return f"dropped by {row['step']}: {row['reason']}"


def lineage_json(chain: Lineage) -> dict[str, Any]:
    stages = [
        {
            "stage": node.manifest.stage,
            "path": str(node.path),
            "fingerprint": node.manifest.fingerprint,
            "content_hash": node.manifest.content_hash,
            "sound": node.sound,
            "inputs": [item.model_dump() for item in node.manifest.inputs],
            "steps": [step.model_dump() for step in node.manifest.steps],
        }
        for node in chain.nodes
    ]
    told: dict[str, Any] = {"stages": stages, "rows": [_row_json(row) for row in chain.rows]}
    return told if chain.ends is None else told | {"ends": chain.ends.to_dicts()}


def _row_json(row: RowLineage) -> dict[str, Any]:
    decisions = [
        vars(decision)
        | {"path": str(decision.path), "step": decision.step, "reason": decision.reason}
        | {"steps": [vars(verdict) for verdict in decision.steps]}
        for decision in row.decisions
    ]
    origin = vars(row.origin) | {"line": row.origin.line}
    related = [_row_json(other) for other in row.related]
    return {"id": row.id, "origin": origin, "decisions": decisions, "related": related}


# --- comparisons -----------------------------------------------------------------------------------------------------


def print_diff(found: Diff) -> None:
    """Rows, why they came and went, settings, drops and the columns that moved."""
    for name, version in (("old", found.old), ("new", found.new)):
        out.print(
            Text(
                f"{name}  {version.path}  {version.rows:,} rows of {version.rows_read:,}  {version.content_hash[:12]}"
            ),
            soft_wrap=True,
        )
    if found.empty:
        out.print("the same rows, made in the same way")
        return
    differing = ", ".join(f"{name} {rows:,}" for name, rows in found.changed_columns.items())
    columns = f" ({differing})" if differing else ""
    out.print(f"\n{_rows(found.rows_same)} stayed, {found.rows_changed:,} changed{columns}")
    for count, verb, moves in ((found.rows_out, "went", found.why_out), (found.rows_in, "came", found.why_in)):
        out.print(f"{_rows(count)} {verb}")
        for move in moves:
            out.print(Text(f"  {move.rows:,} {_move(move, verb)}"), soft_wrap=True)
    if found.settings:
        out.print("\n[bold]settings and inputs[/bold]")
        for line in found.settings:
            out.print(Text(f"  {line}"), soft_wrap=True)
    _print_table(("dropped by", "reason", "old", "new"), _drop_rows(found))
    _print_table(("column", "moved by", "old → new"), _shift_rows(found))


def _rows(count: int) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'}"


def _move(move: Move, verb: str) -> str:
    """Where rows that `went` are now, or rows that `came` were before."""
    if move.reason is None:
        return "not to be found in the other version, dropped rows included"
    return f"{'now' if verb == 'went' else 'before'} dropped in {move.stage} by {move.step}: {move.reason}"


def _drop_rows(found: Diff) -> list[tuple[str, ...]]:
    """A line for each reason that took more rows, or fewer."""
    changed = (drops for drops in found.dropped if drops.old != drops.new)
    return [(drops.step, drops.reason, f"{drops.old:,}", f"{drops.new:,}") for drops in changed]


def _shift_rows(found: Diff) -> list[tuple[str, ...]]:
    """A line for each column that moved at all."""
    moved = [shift for shift in found.shifts if shift.distance > 0]
    return [(shift.column, percent(shift.distance, 1), _figures(shift)) for shift in moved]


def _figures(shift: Shift) -> str:
    """From where to where: the shares of names that moved, or median, p95 and mean of numbers."""
    names = shift.column in NAMES
    texts = []
    for name in shift.old:
        old, new = (percent(side[name] or 0, 1) if names else figure(side[name]) for side in (shift.old, shift.new))
        if old != new:
            texts.append(f"{name} {old} → {new}")
        elif not names:
            texts.append(f"{name} {old}")
    return ", ".join(texts)


def _print_table(names: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in ("old", "new", "moved by") else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
