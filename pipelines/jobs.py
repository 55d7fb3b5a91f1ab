"""From what `orpo train` was asked for to training jobs: one, or one for every combination of swept values.

Nothing heavy is imported here: a wrong key or value is told at once.
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orpo_data.errors import UsageError
from orpo_train.config import TrainConfig
from pipelines.documents import apply_override
from pipelines.layout import Layout
from pipelines.recipe import Recipe, explain_errors


@dataclass(frozen=True)
class TrainingJob:
    """What `orpo train` was asked for."""

    name: str
    dataset: Path
    config: TrainConfig
    output: Path


def training_job(
    recipe: str | None, dataset: Path | None, model: str | None, output: Path | None, overrides: list[str]
) -> TrainingJob:
    """A recipe's training run, or one of a dataset and a base model alone; `overrides` are `train.key=value`.

    Raises UsageError when neither is given.
    """
    if recipe is not None:
        if model is not None:
            overrides = [f"train.model={json.dumps(model)}", *overrides]
        settings = Recipe.read(recipe, overrides)
        if settings.train is None:
            raise UsageError(f"{recipe}: has no `train` section")
        place = Layout(output or Path("runs") / settings.name)
        data = place.reference if settings.train.needs_reference else place.tokenize
        return TrainingJob(settings.name, dataset or data, settings.train, place.model)
    if dataset is None or model is None:
        raise UsageError("orpo train: give a RECIPE, or --dataset DIR and --model M")
    config = _config_from_overrides(model, overrides)
    return TrainingJob("train", dataset, config, (output or dataset.parent) / "model")


def _config_from_overrides(model: str, overrides: list[str]) -> TrainConfig:
    document: dict[str, Any] = {"train": {"model": model}}
    for override in overrides:
        if not override.startswith("train."):
            raise UsageError(f"--set {override!r}: without a recipe only train.KEY=VALUE can be set")
        apply_override(document, override)
    try:
        return TrainConfig.model_validate(document["train"])
    except ValidationError as error:
        raise UsageError(explain_errors(TrainConfig, "train", error)) from None


def sweep_jobs(
    sweeps: Sequence[str],
    recipe: str | None,
    dataset: Path | None,
    model: str | None,
    output: Path | None,
    overrides: Sequence[str],
) -> dict[str, TrainingJob]:
    """A training job for every combination of the swept values, by its name (`lambda=0.1,seed=1`).

    `sweeps` are `key=value,value`, keys of the train section. Raises UsageError naming a key or value that does not
    fit.
    """
    axes = parse_sweeps(sweeps)
    jobs: dict[str, TrainingJob] = {}
    for values in itertools.product(*axes.values()):
        chosen = [f"train.{key}={value}" for key, value in zip(axes, values, strict=True)]
        job = training_job(recipe, dataset, model, output, [*overrides, *chosen])
        name = _run_name(job.config, axes)
        if name in jobs:
            raise UsageError(f"--sweep: {name} stands twice")
        jobs[name] = replace(job, output=job.output.parent / "sweep" / name / job.output.name)
    return jobs


def parse_sweeps(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """The values of each swept key, still as text."""
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, _, text = sweep.partition("=")
        key = key.strip().removeprefix("train.")
        values = [value.strip() for value in text.split(",")]
        if not key or not all(values):
            raise UsageError(f"--sweep {sweep!r}: write KEY=VALUE,VALUE with a key of the train section")
        if key in axes:
            raise UsageError(f"--sweep {sweep!r}: {key} stands twice; give all its values at once")
        axes[key] = values
    return axes


def _run_name(config: TrainConfig, keys: Iterable[str]) -> str:
    """`lambda=0.1,seed=1`: the values as the settings understood them, in the letters a folder's name may have."""
    settings = config.model_dump(mode="json") | config.model_dump(mode="json", by_alias=True)  # lambda_ is lambda
    parts = (f"{key}={_value(settings, key)}" for key in keys)
    return re.sub(r"[^\w.,=+-]+", "-", ",".join(parts))


def _value(settings: Any, key: str) -> str:
    for name in key.split("."):
        settings = settings[name]
    return settings if isinstance(settings, str) else json.dumps(settings)
