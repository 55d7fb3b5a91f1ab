"""Several training runs over one prepared dataset, and what came out of them side by side.

Each run is an ordinary model folder, OUT/sweep/NAME/model; one that is finished is not trained again, so a sweep that
was interrupted goes on.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from orpo_data.places import write_whole
from orpo_train.checkpoint import METRICS_NAME
from orpo_train.curves import Lines, draw_comparison
from orpo_train.run import process_state
from pipelines.checks import check_trackers
from pipelines.jobs import TrainingJob
from pipelines.training import ModelReport, fetch_model, train_model

log = logging.getLogger(__name__)

FIGURES = {
    "loss": "loss",
    "nll_loss": "nll",
    "log_odds_chosen": "log odds ratio",
    "rewards/accuracies": "accuracy",
    "logps/chosen": "logps chosen",
    "logps/rejected": "logps rejected",
}
NOTE = "The loss is each run's own; runs of different objectives or lambdas are compared by the other figures."


@dataclass(frozen=True)
class SweepReport:
    """What a sweep returns: the runs' reports by name, and comparison.json as a value."""

    path: Path
    runs: dict[str, ModelReport]
    comparison: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), **self.comparison}


def train_sweep(jobs: Mapping[str, TrainingJob], *, show_progress: bool = False) -> SweepReport:
    """Train one job after the other and compare them in the folder `sweep`.

    Every process takes part in the training; the main one writes comparison.json, comparison.md and comparison.png.
    """
    for job in jobs.values():
        check_trackers(job.config.trackers)
        fetch_model(job.config.model, job.config.revision)
    if any(job.config.eval_every is None for job in jobs.values()):
        log.warning("sweep: without train.eval_every the picture has held-out figures of the last step only")
    runs: dict[str, ModelReport] = {}
    for number, (name, job) in enumerate(jobs.items(), start=1):
        log.info("sweep: %s, %d of %d", name, number, len(jobs))
        try:
            runs[name] = train_model(job.dataset, job.config, job.output, job=job.name, show_progress=show_progress)
        except OrpoError as error:
            raise type(error)(f"{name}: {error}") from None
    folder = next(iter(runs.values())).path.parents[1]
    comparison = compare_runs(runs)
    processes = process_state()
    if processes.is_main_process:
        write_comparison(folder, comparison, {name: read_metrics(report.path) for name, report in runs.items()})
    processes.wait_for_everyone()
    return SweepReport(folder, runs, comparison)


def compare_runs(runs: Mapping[str, ModelReport]) -> dict[str, Any]:
    """The runs with all their last figures, and the ones that tell them apart: held out where every run has those."""
    held_out = all("eval/loss" in report.metrics for report in runs.values())
    prefix = "eval/" if held_out else ""
    return {
        "dataset": read_manifest(next(iter(runs.values())).path).inputs[0].fingerprint,
        "figures": "held-out pairs" if held_out else "last training batch",
        "runs": [
            {
                "name": name,
                "model": f"{report.path.parent.name}/{report.path.name}",
                "fingerprint": report.fingerprint,
                **{figure: report.metrics.get(f"{prefix}{figure}") for figure in FIGURES},
                "metrics": report.metrics,
            }
            for name, report in runs.items()
        ],
    }


def write_comparison(folder: Path, comparison: dict[str, Any], metrics: Mapping[str, Lines]) -> None:
    """comparison.json, comparison.md and comparison.png, each put in its place whole."""
    partial = folder / ".comparison.partial.png"
    draw_comparison(partial, metrics)
    partial.replace(folder / "comparison.png")
    write_whole(folder / "comparison.json", json.dumps(comparison, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "comparison.md", comparison_page(comparison))


def comparison_page(comparison: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    rows = [["run", *FIGURES.values()], ["---", *["---:"] * len(FIGURES)], *_rows(comparison)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    title = f"# {len(comparison['runs'])} runs on the dataset `{comparison['dataset'][:12]}`"
    picture = "![log-probabilities of the answers over steps](comparison.png)"
    return f"{title}\n\n{picture}\n\nAt the exported step, {comparison['figures']}:\n\n{table}\n\n{NOTE}\n"


def comparison_table(comparison: dict[str, Any]) -> Table:
    """The comparison for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(comparison["figures"], no_wrap=True)
    for label in FIGURES.values():
        table.add_column(label, justify="right")
    for row in _rows(comparison):
        table.add_row(*map(Text, row))
    return table


def _rows(comparison: dict[str, Any]) -> list[list[str]]:
    """A run's name and figures; a figure that its objective does not have stays empty."""
    return [
        [run["name"], *("" if run[figure] is None else f"{run[figure]:.4f}" for figure in FIGURES)]
        for run in comparison["runs"]
    ]


def read_metrics(model: Path) -> list[dict[str, Any]]:
    """The lines of a finished run's metrics.jsonl."""
    return [json.loads(line) for line in (model / METRICS_NAME).read_text("utf-8").splitlines()]
