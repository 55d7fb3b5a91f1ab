"""What the command line prints: tables and samples for people."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from orpo_data.chat import Chat
from orpo_data.errors import OrpoError
from orpo_data.history import Decision, Lineage
from orpo_data.manifest import Manifest
from orpo_data.shards import read_table
from orpo_data.stage import StageReport
from pipelines.checks import chat_of
from pipelines.stages import Progress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

SIDE_STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}


@contextmanager
def stage_progress() -> Iterator[Progress]:
    """A line on stderr for each running stage, with the rows read so far."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} rows"))
    # off a terminal the bar would leave an empty line behind
    with Bar(*columns, TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, rows: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None)
            bar.update(tasks[stage], completed=rows)

        yield show


def print_reports(reports: Sequence[StageReport]) -> None:
    """One line a stage: rows in, rows out, what was dropped and why."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "rows in", "rows out", "seconds"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    table.add_column("dropped")
    for report in reports:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        seconds = f"{report.seconds:.1f}" if report.ran else "unchanged"
        name = f"{report.stage} {report.path.name}" if report.stage == "ingest" else report.stage
        row = (name, f"{report.rows_in:,}", f"{report.rows_out:,}", seconds, dropped)
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
    if reports:
        out.print(Text(f"data   {reports[-1].path}"), soft_wrap=True)


def report_json(report: StageReport) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(report).items()}


def print_dataset(folder: Path, manifest: Manifest, rows: int) -> None:
    """Counts, lengths and the first rows of each split."""
    if manifest.stage in ("train", "evaluate"):
        raise OrpoError(f"{folder}: is the output of {manifest.stage}, rows are in the output of a data stage")
    name = escape(str(folder))
    out.print(f"[bold]{name}[/bold]  {manifest.stage}, {manifest.rows:,} rows, fingerprint {manifest.fingerprint[:12]}")
    for step in manifest.steps:
        source = f" ({step.source})" if step.source else ""
        reasons = "".join(f", {count:,} {reason}" for reason, count in step.dropped.items())
        out.print(f"  {step.step}{source}: {step.rows_in:,} in, {step.rows_out:,} out{reasons}")
    for split in manifest.splits or ["train"]:
        table = read_table(folder, split)
        out.print(f"\n[bold]{split}[/bold]: {len(table):,} rows")
        if not len(table):
            continue
        if "chosen_input_ids" in table.schema.names:
            _print_lengths(table)
            _print_tokenized(table.slice(0, rows).to_pylist(), chat_of(manifest))
        else:
            for row in table.slice(0, rows).to_pylist():
                _print_text_row(row)


def _print_lengths(table: Any) -> None:
    lengths = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tokens", "min", "median", "p95", "max", "truncated"):
        lengths.add_column(name, justify="left" if name == "tokens" else "right")
    columns = {"prompt": table["prompt_len"]} | {
        side: pc.subtract(pc.list_value_length(table[f"{side}_input_ids"]), table["prompt_len"])
        for side in ("chosen", "rejected")
    }
    for name, values in columns.items():
        low, middle, high, top = pc.quantile(values, [0, 0.5, 0.95, 1], interpolation="nearest").to_pylist()
        cut = pc.greater(table["prompt_turns_dropped"], 0) if name == "prompt" else table[f"{name}_truncated"]
        lengths.add_row(name, *(f"{value:,}" for value in (low, middle, high, top, pc.sum(cut).as_py() or 0)))
    out.print(lengths)


def _print_tokenized(rows: Sequence[dict[str, Any]], chat: Chat) -> None:
    """Decoded samples: the prompt is dim and outside the loss, the answers are in colour and inside it."""
    if rows:
        out.print("[dim]prompt (not in the loss)[/dim]  [green]chosen[/green]  [red]rejected[/red]")
    for row in rows:
        out.print(f"\n[bold]{row['id']}[/bold]  {row['source']}")
        prompt = chat.tokenizer.decode(row["chosen_input_ids"][: row["prompt_len"]])
        out.print(Padding(Text(prompt, SIDE_STYLES["prompt"]), (0, 2)))
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_input_ids"][row["prompt_len"] :]
            label = f"[{len(ids)} tokens{', cut' if row[f'{side}_truncated'] else ''}] "
            answer = Text(label, "dim").append(chat.tokenizer.decode(ids), SIDE_STYLES[side])
            out.print(Padding(answer, (0, 4)))


def _print_text_row(row: dict[str, Any]) -> None:
    origin = escape(f"{row['source']} {row['source_file']}")
    out.print(f"\n[bold]{row['id']}[/bold]  {origin} row {row['source_row']}")
    for turn in row["prompt"]:
        out.print(Padding(Text(f"{turn['role']}: {turn['content']}", "dim"), (0, 2)))
    for side in ("chosen", "rejected"):
        for turn in row.get(side) or []:
            out.print(Padding(Text(f"{side}: {turn['content']}", SIDE_STYLES[side]), (0, 4)))
    for completion in row.get("completions") or []:
        text = Text(f"{completion['model']} [{completion['overall_score']}]: {completion['response']}")
        out.print(Padding(text, (0, 4)))


def print_lineage(chain: Lineage) -> None:
    """The stages from the raw files on, and the way of each row asked for."""
    if chain.rows:
        for row in chain.rows:
            origin = escape(f"{row.origin.source}: {row.origin.file}")
            out.print(f"[bold]{row.id}[/bold]  from {origin}, row {row.origin.row}")
            told: dict[str, Any] = {}
            for decision in row.decisions:
                new = {name: value for name, value in decision.detail.items() if told.get(name) != value}
                told |= new
                out.print(_decision_line(decision, new))
        return
    for node in chain.nodes:
        note = "" if node.sound else "  [red](changed since the next stage read it)[/red]"
        out.print(
            f"[bold]{node.manifest.stage}[/bold]  {escape(str(node.path))}  {node.manifest.content_hash[:12]}{note}"
        )
        for item in node.manifest.inputs:
            if item.path is None:
                revision = f" at {item.revision}" if item.revision else ""
                kind = "base model" if node.manifest.stage == "train" else "raw file"
                out.print(f"  {kind} {escape(item.name)}{revision}  sha256 {item.fingerprint[:12]}")
        for step in node.manifest.steps:
            reasons = "".join(f", {count:,} {reason}" for reason, count in step.dropped.items())
            out.print(f"  {step.step} v{step.version}: {step.rows_in:,} in, {step.rows_out:,} out{reasons}")


def _decision_line(decision: Decision, new: dict[str, Any]) -> Text:
    """What a stage did with a row; of its figures those that no earlier stage had."""
    if not decision.kept:
        detail = f" ({decision.detail['detail']})" if decision.detail else ""
        return Text(f"  {decision.stage}: dropped by {decision.step}: {decision.reason}{detail}", "red")
    where = f" in {decision.split}" if decision.split else ""
    figures = "".join(f"\n      {name}: {_figure(value)}" for name, value in new.items())
    return Text(f"  {decision.stage}: kept{where} as {decision.id}{figures}")


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def lineage_json(chain: Lineage) -> dict[str, Any]:
    """A lineage as plain JSON values."""
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
    rows = [
        {
            "id": row.id,
            "origin": vars(row.origin),
            "decisions": [vars(decision) | {"path": str(decision.path)} for decision in row.decisions],
        }
        for row in chain.rows
    ]
    return {"stages": stages, "rows": rows}
