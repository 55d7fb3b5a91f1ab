"""The stages as Prefect tasks, and the flows that run them.

A task's body is a few lines around the stage function that the command line calls too. Tasks hand on paths and digests,
never tables; whether a stage has to run is for its manifest to say, so Prefect's own cache is off.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import Task

from flows.artifacts import publish_curves, publish_drift, publish_evaluation, publish_stages
from flows.clusters import part_runner, task_runner
from flows.logs import log_progress, show_stage_logs
from flows.network import retry_on_network_fault
from orpo_data.errors import UsageError
from orpo_data.locking import running
from orpo_data.manifest import read_manifest
from orpo_data.places import as_path
from pipelines import stages
from pipelines.drift import DriftError
from pipelines.layout import Layout
from pipelines.recipe import Recipe

log = logging.getLogger(__name__)

Report = dict[str, Any]
"""A stage's report as plain values: path, digests, counts."""

P = ParamSpec("P")
R = TypeVar("R")

RETRY_DELAYS = [5.0, 20.0]  # seconds; the hub's client tries again by itself before


def stage_task(run_name: str, *, network: bool = False) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A task that runs a stage; `network`: it may read from the hub, so a fault of the network is tried again."""
    return task(
        task_run_name=run_name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=len(RETRY_DELAYS) if network else 0,
        retry_delay_seconds=RETRY_DELAYS if network else None,
        retry_condition_fn=retry_on_network_fault if network else None,
    )


def as_values(report: Any) -> Report:
    """Any stage's report as plain values."""
    values: Report = vars(report) | {"path": str(report.path)}
    return values


@stage_task("ingest-{source}", network=True)
def ingest(source: str, recipe: dict[str, Any], output: str) -> Report:
    """Raw files of one source to rows."""
    settings = Recipe.parse(recipe)
    config = next(config for config in settings.sources if config.label == source)
    report = stages.ingest(
        config, settings, as_path(output), log_progress(f"ingest {source}"), run_parts=part_runner(settings.runner)
    )
    return as_values(report)


@stage_task("binarize")
def binarize(ingested: list[Report], recipe: dict[str, Any], output: str) -> Report:
    """Every source's rows to pairs."""
    folders = [as_path(report["path"]) for report in ingested]
    settings = Recipe.parse(recipe)
    progress, run_parts = log_progress("binarize"), part_runner(settings.runner)
    return as_values(stages.binarize(folders, settings, as_path(output), progress, run_parts=run_parts))


@stage_task("clean")
def clean(previous: Report, recipe: dict[str, Any], output: str) -> Report:
    """Pairs to those that the rules, dedup and decontamination leave."""
    inputs = as_path(previous["path"])
    settings = Recipe.parse(recipe)
    progress, run_parts = log_progress("clean"), part_runner(settings.runner)
    return as_values(stages.clean(inputs, settings, as_path(output), progress, run_parts=run_parts))


@stage_task("split")
def split(previous: Report, recipe: dict[str, Any], output: str) -> Report:
    """Pairs to a train and an eval side."""
    inputs = as_path(previous["path"])
    settings = Recipe.parse(recipe)
    progress, run_parts = log_progress("split"), part_runner(settings.runner)
    return as_values(stages.split(inputs, settings, as_path(output), progress, run_parts=run_parts))


@stage_task("tokenize", network=True)
def tokenize(previous: Report, recipe: dict[str, Any], output: str) -> Report:
    """Pairs to token ids."""
    inputs = as_path(previous["path"])
    settings = Recipe.parse(recipe)
    progress, run_parts = log_progress("tokenize"), part_runner(settings.runner)
    return as_values(stages.tokenize(inputs, settings, as_path(output), progress, run_parts=run_parts))


@stage_task("reference", network=True)
def reference(dataset: str, recipe: dict[str, Any], output: str) -> Report:
    """Token ids with the log-probabilities of the model that training starts from."""
    from pipelines.reference import reference as run_reference

    settings = Recipe.parse(recipe)
    return as_values(run_reference(as_path(dataset), settings, as_path(output), log_progress("reference")))


@stage_task("train", network=True)
def train(dataset: str, recipe: dict[str, Any], output: str) -> Report:
    """Token ids to a trained model."""
    from pipelines.training import train_model

    settings = Recipe.parse(recipe)
    assert settings.train is not None
    show_progress = sys.stderr.isatty()  # a bar is for people, not for the log of a scheduled run
    report = train_model(
        as_path(dataset), settings.train, as_path(output), job=settings.name, show_progress=show_progress
    )
    return as_values(report)


@stage_task("evaluate", network=True)
def evaluate(model: Report, dataset: str, recipe: dict[str, Any], output: str) -> Report:
    """A trained model's figures on the held-out pairs; the sample answers stay in the folder."""
    from pipelines.evaluation import evaluate_model

    settings = Recipe.parse(recipe)
    folders = as_path(model["path"]), as_path(dataset), as_path(output)
    report = evaluate_model(*folders, settings.evaluate, job=settings.name)
    result = {name: report.result[name] for name in ("pairs", "before", "after")}
    return as_values(report) | {"result": result}


@flow(name="orpo-prepare", persist_result=False)
def prepare_flow(recipe: str, overrides: list[str] | None = None, output: str | None = None) -> dict[str, Any]:
    """The data part: raw files to token ids.

    Args:
        recipe: a recipe file, or the name of a ready recipe; read when the flow runs.
        overrides: `key.path=value`, as `--set` has them.
        output: folder of the run, by default runs/NAME.

    Returns:
        `stages`: a report for each data stage, in order.
    """
    settings, place = read_settings(recipe, overrides, output)
    with running(place.root):
        return {"stages": prepare_data(settings, place)}


@flow(name="orpo-train", persist_result=False)
def train_flow(recipe: str, overrides: list[str] | None = None, output: str | None = None) -> dict[str, Any]:
    """Train and evaluate on what `prepare_flow` has written; arguments as there.

    Returns:
        The reports `model` and, where pairs are held out, `evaluation`.
    """
    settings, place = read_settings(recipe, overrides, output)
    if settings.train is None:
        raise UsageError(f"{recipe}: has no `train` section")
    with running(place.root):
        return _train(settings, place)


@flow(name="orpo-run", persist_result=False)
def run_flow(recipe: str, overrides: list[str] | None = None, output: str | None = None) -> dict[str, Any]:
    """The whole pipeline; arguments as for `prepare_flow`. Without a `train` section it ends with the token ids.

    Returns:
        `stages`, and the reports of `train_flow` where there was training.
    """
    settings, place = read_settings(recipe, overrides, output)
    with running(place.root):
        result: dict[str, Any] = {"stages": prepare_data(settings, place)}
        return result | (_train(settings, place) if settings.train else {})


def read_settings(recipe: str, overrides: list[str] | None, output: str | None) -> tuple[Recipe, Layout]:
    show_stage_logs()
    settings = Recipe.read(recipe, overrides or [])
    return settings, Layout(output or f"runs/{settings.name}")


def prepare_data(settings: Recipe, place: Layout) -> list[Report]:
    if settings.runner.kind == "local":
        return _prepare_here(settings, place)

    @flow(name="orpo-parts", persist_result=False, task_runner=task_runner(settings.runner))
    def parts_flow() -> list[Report]:
        """The data part on a cluster: a flow of its own, for a flow has one task runner.

        It has no parameters: Prefect keeps those, and a recipe's addresses may hold what is nobody's business.
        """
        return _prepare_here(settings, place)

    return parts_flow()


def _prepare_here(settings: Recipe, place: Layout) -> list[Report]:
    """Every data stage, and what they did on Prefect's pages; a stage that drifted too far shows how."""
    try:
        reports = _run_stages(settings, place)
    except DriftError as error:
        publish_drift(settings.name, [error.diff], str(error))
        raise
    publish_stages(settings.name, reports)
    publish_drift(settings.name, [report["diff"] for report in reports if report["diff"]])
    return reports


def _run_stages(settings: Recipe, place: Layout) -> list[Report]:
    recipe = settings.resolved()
    labels = [source.label for source in settings.sources]
    if settings.runner.kind == "local":
        running = [ingest.submit(label, recipe, str(place.ingest(label))) for label in labels]
        ingested = [future.result() for future in running]
    else:  # the cluster is for the parts
        ingested = [ingest(label, recipe, str(place.ingest(label))) for label in labels]
    binarized = binarize(ingested, recipe, str(place.binarize))
    cleaned = clean(binarized, recipe, str(place.clean))
    parted = split(cleaned, recipe, str(place.split))
    tokenized = tokenize(parted, recipe, str(place.tokenize))
    return [*ingested, binarized, cleaned, parted, tokenized]


def _train(settings: Recipe, place: Layout) -> dict[str, Report]:
    assert settings.train is not None
    recipe, dataset = settings.resolved(), str(place.tokenize)
    if settings.train.needs_reference:
        model = train(reference(dataset, recipe, str(place.reference))["path"], recipe, str(place.model))
    else:
        model = train(dataset, recipe, str(place.model))
    publish_curves(settings.name, place.model / "curves.png")
    if not any(shard.rows for shard in read_manifest(place.tokenize).shards if shard.split == "eval"):
        log.warning("nothing is held out: the model is not evaluated; see split.eval_fraction")
        return {"model": model}
    evaluation = evaluate(model, dataset, recipe, str(place.evaluate))
    publish_evaluation(settings.name, model, evaluation)
    return {"model": model, "evaluation": evaluation}
