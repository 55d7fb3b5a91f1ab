"""What the jobs of a comparison came to: the figures of its page, as plain JSON values."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from orpo_data.history import lineage
from orpo_data.manifest import read_manifest
from orpo_train.diversity import Draws, lexical
from orpo_train.loop import TRAIN_NAME
from orpo_train.win_rate import error_over_prompts, length_controlled, outcomes
from pipelines.compare.config import POLICIES
from pipelines.compare.plan import ANSWERS_NAME, REWARD_MODELS, Job, answers_folder, job_config, model_folder
from pipelines.layout import Layout
from pipelines.recipe import Recipe
from pipelines.sweep import read_metrics

HELD_OUT = {
    "eval/rewards/accuracies": "accuracy",
    "eval/log_odds_chosen": "log odds ratio",
    "eval/logps/chosen": "logps chosen",
    "eval/logps/rejected": "logps rejected",
}
"""Figures of the held-out pairs after training, by their names in metrics.jsonl."""

NGRAMS = (1, 2)

Outcome = dict[str, Any]
"""What run_job returned, or {"error": line} of a job that failed or could not start."""


def collect(jobs: Sequence[Job], outcomes: Mapping[str, Outcome], recipe: Recipe, root: Path) -> dict[str, Any]:
    """The whole comparison, as comparison.json has it: runs, tables, distributions and curves."""
    done = [job for job in jobs if "error" not in outcomes[job.name]]
    trained = {job.name: _trained(job, outcomes[job.name], recipe, root) for job in done if not job.answers}
    answered = {job.name: _read(answers_folder(root, job) / ANSWERS_NAME) for job in done if job.answers}
    data = read_manifest(Layout(root).tokenize)
    assert recipe.train is not None
    return {
        "name": recipe.name,
        "base_model": Path(recipe.train.model).name if Path(recipe.train.model).is_dir() else recipe.train.model,
        "dataset": data.fingerprint,
        "pairs": {split: sum(shard.rows for shard in data.shards if shard.split == split) for split in data.splits},
        "recipe": {key: recipe.resolved()[key] for key in ("train", "compare")},
        "runs": list(trained.values()),
        "failed": [{"name": job.name, "error": outcomes[job.name]["error"]} for job in jobs if job not in done],
        "reward_models": _reward_models(trained),
        "held_out": _held_out(jobs, trained),
        "win_rates": _win_rates([job for job in done if job.answers], answered),
        "answers": _answers([job for job in done if job.answers], answered),
        "curves": _curves([job for job in done if not job.answers and job.method not in REWARD_MODELS], root),
        "ratios": _ratios(done, answered),
        "costs": _costs(jobs, trained),
    }


def mean_sd(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation (n - 1; None of a single value) of what is there; None of nothing."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None, "n": len(known)}


def _trained(job: Job, outcome: Outcome, recipe: Recipe, root: Path) -> dict[str, Any]:
    """A trained model: figures, cost, and what it was made of."""
    folder = model_folder(root, job.name)
    trained = _read(folder / TRAIN_NAME)
    manifest = read_manifest(folder)
    config = job_config(job, recipe, root)
    referred = 2 * read_manifest(folder.parent / "reference").rows if config.needs_reference else 0
    base = job.needs[0] if job.needs else Path(config.model).name
    return {
        "name": job.name,
        "label": job.label,
        "method": job.method,
        "seed": job.seed,
        "model": str(folder.relative_to(root)),
        "steps": trained["steps"],
        "exported_step": trained["exported_step"],
        "tokens": trained["tokens"],
        "forward_passes": trained["forward_passes"] + referred,
        "metrics": trained["metrics"],
        "cost": outcome["cost"],
        "lineage": {
            "weights": manifest.content_hash,
            "base": base,
            "base_weights": manifest.inputs[1].fingerprint,
            "dataset": manifest.inputs[0].fingerprint,
            "raw": [
                {"name": item.name, "sha256": item.fingerprint}
                for node in lineage(folder).nodes
                if node.manifest.stage == "ingest"
                for item in node.manifest.inputs
            ],
        },
    }


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return content


def _labels(jobs: Iterable[Job]) -> list[str]:
    return [*dict.fromkeys(job.label for job in jobs)]


def _reward_models(trained: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How often each reward model prefers the chosen answers of the held-out pairs."""
    runs = (run for run in trained.values() if run["method"] in REWARD_MODELS)
    return [{"label": run["label"], "accuracy": run["metrics"].get("eval/rewards/accuracies")} for run in runs]


def _held_out(jobs: Sequence[Job], trained: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sd over the seeds of each policy's figures on the held-out pairs, in the order of the paper."""
    table = []
    for label in _labels(job for job in jobs if job.method in POLICIES):
        runs = [run for run in trained.values() if run["label"] == label]
        figures = {name: mean_sd(run["metrics"].get(key) for run in runs) for key, name in HELD_OUT.items()}
        table.append({"label": label, "runs": len(runs), **figures})
    return table


def _win_rates(jobs: Sequence[Job], answered: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """ORPO's win rate over each other policy, by ORPO's label and the other's; None where no seed trained both."""
    ours = _labels(job for job in jobs if job.method == "orpo")
    others = _labels(job for job in jobs if job.method != "orpo")
    return {label: {other: _win_rate(label, other, jobs, answered) for other in others} for label in ours}


def _win_rate(label: str, other: str, jobs: Sequence[Job], answered: Mapping[str, Any]) -> dict[str, Any] | None:
    """Mean and sd over the seeds that trained both and the draws of their answers, the error over the prompts, and the
    rate at equal length.
    """
    answers = {(job.label, job.seed): answered[job.name] for job in jobs}
    seeds = [seed for name, seed in answers if name == label and (other, seed) in answers]
    if not seeds:
        return None
    scores = np.concatenate(
        [outcomes(answers[label, seed]["rewards"], answers[other, seed]["rewards"]) for seed in seeds]
    )  # [seeds x draws, prompts]
    longer = np.concatenate(
        [np.subtract(answers[label, seed]["characters"], answers[other, seed]["characters"]) for seed in seeds]
    )
    over_draws = mean_sd(scores.mean(axis=1).tolist()) or {}
    equal_length = length_controlled(scores.ravel(), longer.ravel())
    return {**over_draws, "error": error_over_prompts(scores), "equal_length": equal_length}


def _answers(jobs: Sequence[Job], answered: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rewards, lengths and diversity of each policy's answers, over all its seeds and draws."""
    table = []
    for label in _labels(jobs):
        told = [answered[job.name] for job in jobs if job.label == label]
        rewards, characters, ended = (
            [draw for answers in told for draw in answers[name]] for name in ("rewards", "characters", "ended")
        )
        table.append(
            {
                "label": label,
                "reward": mean_sd(map(statistics.fmean, rewards)),
                "characters": mean_sd(map(statistics.fmean, characters)),
                "unended": mean_sd(1 - statistics.fmean(draw) for draw in ended),
                **{f"distinct_{n}": _distinct([answers["texts"] for answers in told], n) for n in NGRAMS},
                "rewards": list(chain.from_iterable(rewards)),
            }
        )
    return table


def _distinct(models: Sequence[Draws], n: int) -> dict[str, Any]:
    """distinct-n within and across prompts: mean and sd over the models of a method."""
    found = [lexical(draws, n) for draws in models]
    return {name: mean_sd(figures[name] for figures in found) for name in ("within", "across")}


def _ratios(jobs: Sequence[Job], answered: Mapping[str, Any]) -> dict[str, Any] | None:
    """Log odds and log probability ratios of the held-out pairs under the first ORPO model that answered."""
    first = next((job for job in jobs if job.answers and job.method == "orpo"), None)
    return {"label": first.label, **answered[first.name]["pairs"]} if first else None


def _curves(jobs: Sequence[Job], root: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl of each policy's first seed."""
    first = {job.label: job for job in reversed(jobs)}
    return {label: read_metrics(model_folder(root, first[label].name)) for label in _labels(jobs)}


def _costs(jobs: Sequence[Job], trained: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What a training of each method costs, mean over its seeds; without what it starts from or learns from."""
    table = []
    for label in _labels(job for job in jobs if not job.answers):
        runs = [run for run in trained.values() if run["label"] == label]
        costs = [run["cost"] for run in runs if run["cost"]]
        table.append(
            {
                "label": label,
                "runs": len(runs),
                "seconds": mean_sd(cost["seconds"] for cost in costs),
                "cpu_seconds": mean_sd(cost.get("cpu_seconds") for cost in costs),
                "peak_bytes": mean_sd(cost["peak_bytes"] for cost in costs),
                **{name: mean_sd(run[name] for run in runs) for name in ("steps", "tokens", "forward_passes")},
            }
        )
    return table
