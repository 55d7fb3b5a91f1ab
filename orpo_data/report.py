"""Pages for people: the card and the report of a dataset folder, and the page of an evaluation."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from orpo_data.manifest import Manifest
from orpo_data.report_page import Histogram, Numbers, length_histogram, margin_histogram, render
from orpo_data.schema import RATED, TOKENIZED
from orpo_data.shards import open_shard

SAMPLES = 5
SAMPLES_PER_REASON = 2
ORIGIN_FIELDS = {"id", "source", "source_file", "source_row", "subset"}  # shown beside a dropped row, not in it

KINDS = {
    "rated": "Prompts, each with several rated answers.",
    "pairs": "Preference pairs: a prompt, a better and a worse answer, as messages.",
    "tokenized": "Preference pairs as token ids, ready for training: each side is prompt and answer in one sequence.",
}

METRICS = {  # name -> label, what it is, and whether more (+1) or less (-1) is better
    "pair_accuracy": ("Pair accuracy", "share of pairs whose chosen answer has the higher log probability", 1),
    "margin": ("Margin", "mean of log P(chosen) - log P(rejected)", 1),
    "log_odds_ratio": ("Log odds ratio", "mean of log odds(chosen) - log odds(rejected)", 1),
    "nll": ("NLL", "negative log-likelihood of the chosen answer", -1),
    "logps_chosen": ("log P(chosen)", "log probability of a token of the chosen answer, mean over the pairs", 1),
    "logps_rejected": ("log P(rejected)", "log probability of a token of the rejected answer, mean over the pairs", 0),
}
HEADLINES = ("Pair accuracy", "Log odds ratio")


def write_pages(folder: Path, manifest: Manifest) -> None:
    """Write README.md and report.html into a dataset folder whose shards are closed but whose manifest is not there."""
    first = open_shard(folder / manifest.shards[0].path)
    kind = _kind(first.schema)
    title = f"{manifest.recipe.get('name', 'dataset')}: {manifest.stage}"
    shared = {"manifest": manifest, "title": title, "about": KINDS[kind], "columns": first.schema.names}
    card = render("README.md.jinja", front_matter=_front_matter(manifest), **shared)
    lengths, sources = _measure(folder, manifest, kind)
    report = render(
        "report.html.jinja",
        kind=kind,
        branches=[(source, list(steps)) for source, steps in groupby(manifest.steps, key=lambda step: step.source)],
        most_rows=max(manifest.rows_in, 1, *(step.rows_in + step.expanded for step in manifest.steps)),
        charts=_length_charts(lengths),
        unit="tokens" if kind == "tokenized" else "characters",
        sources=sources,
        samples=list(_samples(folder, manifest)),
        dropped=_dropped_samples(folder, manifest),
        **shared,
    )
    for name, text in (("README.md", card), ("report.html", report)):
        (folder / name).write_bytes(text.encode())


def _kind(schema: pa.Schema) -> str:
    return {tuple(RATED.names): "rated", tuple(TOKENIZED.names): "tokenized"}.get(tuple(schema.names), "pairs")


def _front_matter(manifest: Manifest) -> str:
    """The card's YAML, by which the Hugging Face hub finds and sizes the data."""
    files = [{"split": name, "path": f"{name}/data-*.arrow"} for name in manifest.splits]
    power = next((n for n in range(3, 9) if manifest.rows < 10**n), 9)
    names = {3: "1K", 4: "10K", 5: "100K", 6: "1M", 7: "10M", 8: "100M", 9: "1B"}
    card = {
        "tags": ["preference", "orpo"],
        "size_categories": ["n<1K" if power == 3 else f"{names[power - 1]}<n<{names[power]}"],
        "configs": [{"config_name": "default", "data_files": files or [{"split": "train", "path": "data-*.arrow"}]}],
    }
    return yaml.safe_dump(card, sort_keys=False)


def _measure(folder: Path, manifest: Manifest, kind: str) -> tuple[dict[str, Numbers], dict[str, Counter[str | None]]]:
    """Over all shards: lengths by part of a row, and rows by source and split."""
    parts: dict[str, list[Numbers]] = {}
    rows: dict[str, Counter[str | None]] = {}
    for shard in manifest.shards:
        table = open_shard(folder / shard.path)
        for entry in pc.value_counts(table["source"]).to_pylist():
            rows.setdefault(entry["values"], Counter())[shard.split] += entry["counts"]
        for batch in table.to_batches():
            for name, lengths in _LENGTHS[kind](batch).items():
                parts.setdefault(name, []).append(lengths)
    return {name: np.concatenate(lengths) for name, lengths in parts.items()}, rows


def _rated_lengths(batch: pa.RecordBatch) -> dict[str, Numbers]:
    answers = batch["completions"].flatten().field("response")
    return {"prompt": _characters(batch["prompt"]), "answers": pc.utf8_length(answers.drop_null()).to_numpy()}


def _pair_lengths(batch: pa.RecordBatch) -> dict[str, Numbers]:
    return {name: _characters(batch[name]) for name in ("prompt", "chosen", "rejected")}


def _token_lengths(batch: pa.RecordBatch) -> dict[str, Numbers]:
    prompt = batch["prompt_len"]
    sides = {side: pc.list_value_length(batch[f"{side}_input_ids"]) for side in ("chosen", "rejected")}
    answers = {side: pc.subtract(length, prompt).to_numpy() for side, length in sides.items()}
    return {"prompt": prompt.to_numpy(), **answers}


_LENGTHS = {"rated": _rated_lengths, "pairs": _pair_lengths, "tokenized": _token_lengths}


def _characters(conversations: pa.ListArray) -> Numbers:
    """Characters of each conversation, its messages together; [rows]."""
    lengths = pc.utf8_length(conversations.values.field("content")).fill_null(pa.scalar(0, pa.int32())).to_numpy()
    before = np.concatenate([[0], np.cumsum(lengths)])
    return np.diff(before[conversations.offsets.to_numpy()])


def _length_charts(lengths: dict[str, Numbers]) -> list[Histogram]:
    """The prompt by itself; the two sides in one chart, since their difference is what a model may learn instead."""
    prompt = {name: values for name, values in lengths.items() if name == "prompt"}
    answers = {name: values for name, values in lengths.items() if name != "prompt"}
    charts = [length_histogram(series) for series in (prompt, answers) if series]
    return [chart for chart in charts if chart]


def _samples(folder: Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The first rows of the dataset; of token ids only how many there are."""
    left = SAMPLES
    for shard in manifest.shards:
        for row in open_shard(folder / shard.path).slice(0, left).to_pylist():
            left -= 1
            yield {name: len(value) if name.endswith("_input_ids") else value for name, value in row.items()}


def _dropped_samples(folder: Path, manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """The first dropped rows of each reason, the most frequent reason first."""
    samples: dict[str, list[dict[str, Any]]] = {reason: [] for reason in manifest.drop_reasons}
    for shard in manifest.dropped:
        table = open_shard(folder / shard.path)
        for reason, rows in samples.items():
            left = SAMPLES_PER_REASON - len(rows)
            found = pc.indices_nonzero(pc.equal(table["reason"], reason))[:left] if left else []
            rows += [table.slice(at.as_py(), 1).to_pylist()[0] for at in found]
    return {reason: [{**row, "fields": _fields(row["row"])} for row in rows] for reason, rows in samples.items()}


def _fields(text: str) -> dict[str, str]:
    """What a dropped row held, by column; the text as it is when it is no JSON object."""
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        return {"record": text}
    return {name: _as_text(value) for name, value in row.items() if value is not None and name not in ORIGIN_FIELDS}


def _as_text(value: Any) -> str:
    """A conversation as lines `role: content`, token ids as their number; anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return "\n".join(f"{turn.get('role')}: {turn['content']}" for turn in value)
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return f"{len(value):,} ids"
    return orjson.dumps(value).decode()


@dataclass(frozen=True)
class _MetricRow:
    label: str
    meaning: str
    before: float | None
    after: float
    direction: int  # +1 more is better, -1 less is better, 0 neither
    percent: bool

    @property
    def change(self) -> float | None:
        return None if self.before is None else self.after - self.before

    @property
    def verdict(self) -> str:
        gain = self.direction * (self.change or 0.0)
        return "better" if gain > 0 else "worse" if gain < 0 else ""

    def text(self, value: float | None, sign: str = "") -> str:
        if value is None:
            return "-"
        if self.percent:
            return f"{100 * value:{sign}.1f} {'points' if sign else '%'}"
        return f"{value:{sign}.4f}"


def evaluation_page(result: Mapping[str, Any]) -> str:
    """An evaluation as one self-contained HTML page.

    `result` has model, base_model (or None), dataset and pairs; `before` (or None) and `after`, each metric -> value;
    `per_pair` with before_margin (or None) and after_margin, the log odds of chosen over rejected for each pair; and
    `samples` of prompt, chosen, before (or None) and after.
    """
    before, after = result["per_pair"].get("before_margin"), result["per_pair"]["after_margin"]
    metrics = [_metric_row(name, result) for name in _metric_names(result["after"])]
    return render(
        "evaluation.html.jinja",
        title=f"Evaluation of {result['model']}",
        result=result,
        metrics=metrics,
        headlines=[(metric.label, metric.text(metric.after)) for metric in metrics if metric.label in HEADLINES],
        chart_data=margin_histogram({"after": after} if before is None else {"before": before, "after": after}),
        flips=_flips(before, after) if before is not None else None,
    )


def _metric_names(metrics: Mapping[str, float]) -> list[str]:
    known = [name for name in METRICS if name in metrics]
    return known + [name for name in metrics if name not in METRICS]


def _metric_row(name: str, result: Mapping[str, Any]) -> _MetricRow:
    label, meaning, direction = METRICS.get(name, (name, "", 0))
    before = (result["before"] or {}).get(name)
    return _MetricRow(label, meaning, before, result["after"][name], direction, percent=name == "pair_accuracy")


def _flips(before: list[float], after: list[float]) -> dict[str, int]:
    """Pairs whose preferred side changed."""
    was, now = np.asarray(before, dtype=float) > 0, np.asarray(after, dtype=float) > 0
    return {"won": int((~was & now).sum()), "lost": int((was & ~now).sum())}
