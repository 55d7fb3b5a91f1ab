"""The comparison as a Prefect flow: the data part, then every job as a task of its own, then the page.

Jobs that do not need each other run side by side: on the workers of a cluster, or `runner.workers` of them here.
"""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.artifacts import publish_comparison
from flows.clusters import task_runner
from flows.pipeline import Report, prepare_data, read_settings, stage_task
from orpo_data.errors import OrpoError, UsageError
from orpo_data.locking import running
from orpo_data.places import is_local, without_secrets
from pipelines.compare.apart import end_jobs, run_apart
from pipelines.compare.plan import Job, plan
from pipelines.recipe import Recipe


class ComparisonError(OrpoError):
    """Some jobs of a comparison failed; its page shows the others."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


@stage_task("{name}")
def run_job(name: str, job: dict[str, Any], recipe: dict[str, Any], root: str) -> Report:
    """One training, or one policy's answers, in a process of its own."""
    return run_apart(Job.model_validate(job), Recipe.parse(recipe), Path(root))


@flow(name="orpo-compare-jobs", persist_result=False)
def jobs_flow(recipe: dict[str, Any], output: str) -> dict[str, Report]:
    """Every job of a comparison on this flow's task runner: what each came to, by name."""
    jobs = plan(Recipe.parse(recipe))
    futures: dict[str, PrefectFuture[Report]] = {}
    try:
        for job in jobs:
            needed = [futures[name] for name in job.needs]
            asked = (job.name, job.model_dump(), recipe, output)
            futures[job.name] = run_job.submit(*asked, return_state=False, wait_for=needed)
        outcomes: dict[str, Report] = {}
        for job in jobs:
            outcomes[job.name] = _outcome(job, futures[job.name], outcomes)
        return outcomes
    finally:
        end_jobs()  # those that still run when the flow is ended


def _outcome(job: Job, future: "PrefectFuture[Report]", outcomes: dict[str, Report]) -> Report:
    """The report of a job, or the one line that says why there is none."""
    future.wait()
    if missing := [name for name in job.needs if "error" in outcomes[name]]:
        return {"error": f"not run: it needs {' and '.join(missing)}"}
    result = future.result(raise_on_failure=False)
    if not isinstance(result, BaseException):
        return result
    if not isinstance(result, OrpoError | OSError):
        raise result
    return {"error": " ".join(str(result).split())}


@flow(name="orpo-compare", persist_result=False)
def compare_flow(recipe: str, overrides: list[str] | None = None, output: str | None = None) -> dict[str, Any]:
    """The paper's comparison on one dataset; arguments as for `prepare_flow`.

    Returns:
        `stages`: a report for each data stage; `page`: where the page lies; `comparison`: what it shows.

    Raises:
        ComparisonError, which holds the same, where jobs failed: the page is written all the same.
        UsageError for an output on a storage.
    """
    from pipelines.compare.page import write_comparison

    settings, place = read_settings(recipe, overrides, output)
    if not is_local(place.root):
        raise UsageError("compare: trains into folders of this machine; give -o a local one")
    plan(settings, recipe)
    with running(place.root):
        stages = prepare_data(settings, place)
        told = without_secrets(settings.resolved())  # Prefect keeps it, and no job reads the raw files
        outcomes = jobs_flow.with_options(task_runner=_runner(settings))(told, str(place.root))
        page, comparison = write_comparison(settings, place.root, outcomes)
    publish_comparison(settings.name, comparison)
    result = {"stages": stages, "page": str(page), "comparison": comparison}
    if failed := comparison["failed"]:
        runs = "run" if len(failed) == 1 else "runs"
        raise ComparisonError(
            f"{len(failed)} {runs} failed, the first is {failed[0]['name']}: {failed[0]['error']}", result
        )
    return result


def _runner(settings: Recipe) -> TaskRunner[Any]:
    if settings.runner.kind == "local":
        return ThreadPoolTaskRunner(max_workers=settings.runner.workers)
    return task_runner(settings.runner)
