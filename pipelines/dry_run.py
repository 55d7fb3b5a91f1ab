"""What the tokenize stage would cut and drop, at the recipe's limits and at others, before anything is written."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orpo_data.batches import BATCH_ROWS
from orpo_data.chat import Chat
from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from orpo_data.schema import ENCODED_SIDES
from orpo_data.shards import check_sizes, iter_tables
from orpo_data.steps.truncate import Truncate
from orpo_data.views import CLEANED
from pipelines.recipe import Recipe
from pipelines.stages import Progress, quiet

OTHER_LIMITS = (512, 1024, 2048, 4096, 8192)
BINS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
BAR = 10  # characters of the longest bar: with its count it fits a terminal of 80


@dataclass
class Outcome:
    """What one pair of limits does to all rows that can be rendered."""

    max_length: int
    max_prompt_length: int
    kept: int = 0
    prompts_shortened: int = 0  # kept rows that lose whole oldest turns
    chosen_cut: int = 0  # kept rows whose answer loses its end
    rejected_cut: int = 0
    tokens: int = 0  # of both sides of the kept rows
    dropped: Counter[str] = field(default_factory=Counter)  # by reason


@dataclass
class LengthReport:
    """Lengths in tokens of every row that can be rendered, and what limits make of them."""

    rows: int = 0  # read
    refused: Counter[str] = field(default_factory=Counter)  # dropped before they have a length, by reason
    lengths: dict[str, Counter[int]] = field(
        default_factory=dict
    )  # of prompt, chosen, rejected and the longer sequence
    outcomes: list[Outcome] = field(default_factory=list)  # at the recipe's limits first

    def edges(self) -> list[int]:
        """Upper ends of the histogram's bins: powers of two and the recipe's own limits."""
        own = self.outcomes[0]
        longest = max((max(counts, default=0) for counts in self.lengths.values()), default=0)
        edges = sorted({*BINS, own.max_length, own.max_prompt_length})
        return [*(edge for edge in edges if edge < longest), max(longest, 1)]

    def histogram(self, name: str) -> list[int]:
        """Rows in each bin of `edges`."""
        values = np.fromiter(self.lengths[name].elements(), np.int64)
        counts: list[int] = np.bincount(np.searchsorted(self.edges(), values), minlength=len(self.edges())).tolist()
        return counts

    def to_json(self) -> dict[str, Any]:
        lengths = {
            name: _quantiles(counts) | {"up_to": dict(zip(self.edges(), self.histogram(name), strict=True))}
            for name, counts in self.lengths.items()
        }
        outcomes = [vars(outcome) | {"dropped": dict(outcome.dropped)} for outcome in self.outcomes]
        return {"rows": self.rows, "refused": dict(self.refused), "lengths": lengths, "outcomes": outcomes}


def measure_lengths(inputs: Path, recipe: Recipe, progress: Progress = quiet) -> LengthReport:
    """Render and encode every row of a cleaned dataset as the tokenize stage would; nothing is written.

    At other limits the prompt may have the share of the whole that the recipe gives it.
    """
    manifest = read_manifest(inputs)
    if manifest.stage not in CLEANED:
        raise OrpoError(f"{inputs}: is the output of {manifest.stage}, the output of clean or split is needed here")
    check_sizes(inputs, manifest)
    settings = recipe.tokenize
    chat = Chat.load(settings.tokenizer, settings.chat_template, settings.revision)
    *render_and_encode, truncate = settings.steps(chat)
    assert isinstance(truncate, Truncate)
    variants = list(_variants(truncate))
    report = LengthReport(outcomes=[Outcome(step.max_length, step.max_prompt_length) for step in variants])
    report.lengths = {name: Counter() for name in ("prompt", "chosen", "rejected", "longer sequence")}
    for _, table in iter_tables(inputs, manifest, BATCH_ROWS):
        report.rows += len(table)
        for step in render_and_encode:
            output = step.apply(table)
            report.refused.update(output.dropped["reason"].to_pylist())
            table = output.kept
        _measure(table, variants, report)
        progress("dry run", report.rows)
    return report


def _variants(truncate: Truncate) -> Iterator[Truncate]:
    """The step with the recipe's limits, then with others."""
    yield truncate
    for limit in OTHER_LIMITS:
        if limit != truncate.max_length:
            prompt = max(1, limit * truncate.max_prompt_length // truncate.max_length)
            yield truncate.model_copy(update={"max_length": limit, "max_prompt_length": prompt})


def _measure(encoded: pa.Table, variants: list[Truncate], report: LengthReport) -> None:
    """Add a table of ENCODED rows to the report."""
    prompt, chosen, rejected = (pc.list_value_length(encoded[name]).to_numpy() for name in ENCODED_SIDES)
    whole = prompt + np.maximum(chosen, rejected)
    for counts, values in zip(report.lengths.values(), (prompt, chosen, rejected, whole), strict=True):
        counts.update(values.tolist())
    for step, outcome in zip(variants, report.outcomes, strict=True):
        # rows within the limits pass as they are, unless both sides are the same: only the rest goes through the step
        fits = (prompt <= step.max_prompt_length) & (whole <= step.max_length) & (chosen != rejected)
        outcome.kept += int(fits.sum())
        outcome.tokens += int((2 * prompt + chosen + rejected)[fits].sum())
        result = step.apply(encoded.filter(pa.array(~fits)))
        kept = result.kept
        outcome.kept += len(kept)
        outcome.prompts_shortened += pc.sum(pc.greater(kept["prompt_turns_dropped"], 0)).as_py() or 0
        outcome.chosen_cut += pc.sum(kept["chosen_truncated"]).as_py() or 0
        outcome.rejected_cut += pc.sum(kept["rejected_truncated"]).as_py() or 0
        for side in ("chosen", "rejected"):
            outcome.tokens += pc.sum(pc.list_value_length(kept[f"{side}_input_ids"])).as_py() or 0
        outcome.dropped.update(result.dropped["reason"].to_pylist())


def _quantiles(counts: Counter[int]) -> dict[str, int]:
    values = np.fromiter(counts.elements(), np.int64)
    if not len(values):
        return {}
    quantiles = np.quantile(values, [0, 0.5, 0.95, 1], method="nearest")
    return dict(zip(("min", "median", "p95", "max"), map(int, quantiles), strict=True))


# --- for people -------------------------------------------------------------------------------------------------------


def length_tables(report: LengthReport) -> RenderableType:
    """The histogram, and a line for each pair of limits."""
    refused = "".join(f", {count:,} {reason}" for reason, count in sorted(report.refused.items()))
    measured = report.rows - report.refused.total()
    head = Text(f"{measured:,} of {report.rows:,} rows have a length{refused}; nothing is written")
    return Group(head, _histogram_table(report), _outcome_table(report))


def _histogram_table(report: LengthReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    names = {report.outcomes[0].max_prompt_length: "max_prompt_length", report.outcomes[0].max_length: "max_length"}
    table.add_column("", no_wrap=True)
    for name in report.lengths:
        table.add_column(name, no_wrap=True)
    columns = {name: report.histogram(name) for name in report.lengths}
    for i, edge in enumerate(report.edges()):
        cells = [_bar(values[i], max(values)) for values in columns.values()]
        table.add_row(f"up to {edge:,}", Text(names.get(edge, ""), "bold"), *cells)
    return table


def _bar(count: int, most: int) -> str:
    """The count behind a bar; any row at all shows."""
    length = -(-count * BAR // most) if most else 0
    return f"{'█' * length}{' ' if length else ''}{count:,}"


def _outcome_table(report: LengthReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("limits")
    for name in ("total", "prompt", "kept", "prompt shortened", "chosen cut", "rejected cut", "tokens kept"):
        table.add_column(name, justify="right")
    table.add_column("dropped")
    everything = sum(
        length * count * (2 if name == "prompt" else 1)
        for name in ("prompt", "chosen", "rejected")
        for length, count in report.lengths[name].items()
    )
    for index, outcome in enumerate(report.outcomes):
        figures = (outcome.kept, outcome.prompts_shortened, outcome.chosen_cut, outcome.rejected_cut)
        share = f"{outcome.tokens / everything:.1%}" if everything else "-"
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(outcome.dropped.items()))
        limits = (f"{outcome.max_length:,}", f"{outcome.max_prompt_length:,}")
        name, style = ("recipe", "bold") if index == 0 else ("other", None)
        table.add_row(name, *limits, *(f"{figure:,}" for figure in figures), share, dropped, style=style)
    return table
