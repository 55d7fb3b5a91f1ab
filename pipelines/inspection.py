"""What `orpo inspect` prints: counts, lengths, and rows as the training loss sees them.

Every line of a sample begins with a mark, so that it reads the same in a pipe: `+` the chosen answer, `-` the rejected
one, both in the loss; no mark for the prompt, which is not. On a terminal the tokens in the loss lie on colour, one
shade after the other, so that their bounds show.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orpo_data.chain import record_name
from orpo_data.chat import Chat
from orpo_data.errors import OrpoError
from orpo_data.manifest import Manifest, StepCounts
from orpo_data.schema import TOKEN_STAGES
from orpo_data.shards import read_table
from pipelines.checks import chat_of
from pipelines.console import out
from pipelines.printable import printable

MARKS = {"prompt": "  ", "chosen": "+ ", "rejected": "- "}
SHADES = {
    "chosen": ("bright_white on dark_green", "bright_white on green4"),
    "rejected": ("bright_white on dark_red", "bright_white on red3"),
}
STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}
SHOWN_TOKENS = 160  # of a prompt or an answer, half of them from its end
SHOWN_CHARACTERS = 800


def print_dataset(folder: Path, manifest: Manifest, rows: int, full: bool = False) -> None:
    """Counts, lengths and the first rows of each split; long texts lose their middle unless `full`."""
    if manifest.stage in ("train", "evaluate"):
        raise OrpoError(f"{folder}: is the output of {manifest.stage}, rows are in the output of a data stage")
    name = escape(str(folder))
    about = f"{manifest.stage}, {manifest.rows:,} rows, fingerprint {manifest.fingerprint[:12]}"
    out.print(f"[bold]{name}[/bold]  {about}", soft_wrap=True)  # a path stays whole
    for step in manifest.steps:
        out.print(_step_line(step))
    for split in manifest.splits or ["train"]:
        table = read_table(folder, split)
        out.print(f"\n[bold]{split}[/bold]: {len(table):,} rows")
        if not len(table):
            continue
        if manifest.stage in TOKEN_STAGES:
            out.print(_length_table(table))
            _print_token_rows(table.slice(0, rows).to_pylist(), chat_of(manifest), full)
        else:
            for row in table.slice(0, rows).to_pylist():
                _print_text_row(row, full)


def _step_line(step: StepCounts) -> Text:
    source = f" ({step.source})" if step.source else ""
    reasons = "".join(f", {count:,} {reason}" for reason, count in step.dropped.items())
    flags = "".join(f", {count:,} {rule}" for rule, count in step.flagged.items())
    flagged = f"; flagged{flags[1:]}" if flags else ""
    return Text(f"  {step.step}{source}: {step.rows_in:,} in, {step.rows_out:,} out{reasons}{flagged}")


def _length_table(table: pa.Table) -> Table:
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
    return lengths


# --- token ids --------------------------------------------------------------------------------------------------------


def _print_token_rows(rows: Sequence[dict[str, Any]], chat: Chat, full: bool) -> None:
    if rows:
        out.print(
            Text.assemble(
                ("prompt, not in the loss", STYLES["prompt"]),
                *("   ", ("+ chosen, in the loss", SHADES["chosen"][0])),
                *("   ", ("- rejected, in the loss", SHADES["rejected"][0])),
            )
        )
    for row in rows:
        cut = row["prompt_turns_dropped"]
        turns = f", {cut} oldest turns left out" if cut else ""
        out.print(
            Text.assemble("\n", (row["id"], "bold"), f"  {row['source']}, prompt {row['prompt_len']} tokens{turns}")
        )
        _print_marked("prompt", _shaded(chat, row["chosen_input_ids"][: row["prompt_len"]], "prompt", full))
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_input_ids"][row["prompt_len"] :]
            cut = ", cut: no end of turn" if row[f"{side}_truncated"] else ""
            _print_marked(side, Text.assemble((f"[{len(ids)} tokens{cut}] ", "dim"), _shaded(chat, ids, side, full)))


def _shaded(chat: Chat, ids: list[int], side: str, full: bool) -> Text:
    """Decoded ids; in the loss each token lies on another shade than the one before it."""
    parts = [ids] if full or len(ids) <= SHOWN_TOKENS else [ids[: SHOWN_TOKENS // 2], ids[-(SHOWN_TOKENS // 2) :]]
    text = Text()
    for number, part in enumerate(parts):
        if number:
            text.append(f" … {len(ids) - SHOWN_TOKENS:,} tokens … ", "dim italic")
        for index, piece in enumerate(token_texts(chat, part)):
            text.append(printable(piece), SHADES[side][index % 2] if side in SHADES else STYLES[side])
    return text


def token_texts(chat: Chat, ids: Sequence[int]) -> Iterator[str]:
    """The text that each token adds; a token that leaves a character unfinished adds nothing until it is complete."""

    def decode(start: int, end: int) -> str:
        return str(chat.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))

    before, done = 0, 0  # decoded from `before`: a token's text can depend on the one before it
    for end in range(1, len(ids) + 1):
        text = decode(before, end)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            yield ""
            continue
        yield text[len(decode(before, done)) :]
        before, done = done, end


# --- text -------------------------------------------------------------------------------------------------------------


def _print_text_row(row: dict[str, Any], full: bool) -> None:
    origin = printable(f"  {row['source']} {row['source_file']} {record_name(row['source_file'], row['source_row'])}")
    out.print(Text.assemble("\n", (row["id"], "bold"), origin))
    for note in _notes(row):
        out.print(Text(f"  {note}", "yellow"))
    for turn in row["prompt"]:
        _print_marked("prompt", Text(f"{turn['role']}: {_shortened(turn['content'], full)}", STYLES["prompt"]))
    for side in ("chosen", "rejected"):
        for turn in row.get(side) or []:
            _print_marked(side, Text(f"{side}: {_shortened(turn['content'], full)}", STYLES[side]))
    for answer in row.get("completions") or []:
        text = _shortened(answer["response"] or "", full)
        _print_marked("prompt", Text(f"{answer['model']} [{answer['overall_score']}]: {text}"))


def _notes(row: dict[str, Any]) -> Iterator[str]:
    """What is known of a pair beside its text: scores, models, flags, how doubtful its label is."""
    if row.get("score_chosen") is not None or row.get("score_rejected") is not None:
        yield f"score {_figure(row['score_chosen'])} over {_figure(row['score_rejected'])}"
    if row.get("model_chosen") or row.get("model_rejected"):
        yield printable(f"model {row['model_chosen']} over {row['model_rejected']}")
    if flags := row.get("flags"):
        yield "flags: " + ", ".join(_flag(flag) for flag in flags)
    if row.get("label_noise") is not None:
        yield f"label noise {row['label_noise']:.2f}"


def _flag(flag: dict[str, Any]) -> str:
    value = "" if flag["value"] is None else f" {_figure(flag['value'])}"
    return f"{flag['rule']}{value} ({flag['side']})"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _shortened(text: str, full: bool) -> str:
    """`text` without its middle if it is long."""
    if full or len(text) <= SHOWN_CHARACTERS:
        return printable(text)
    half = SHOWN_CHARACTERS // 2
    return printable(f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}")


def _print_marked(side: str, text: Text) -> None:
    """Print `text` with its side's mark before every line, also where a long line is folded."""
    mark = Text(MARKS[side], STYLES[side])
    for line in text.wrap(out, max(out.width - 4, 20)):
        out.print(Text("  ") + mark + line, soft_wrap=True)
