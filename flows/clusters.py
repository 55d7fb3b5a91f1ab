"""Where the parts of a stage are worked on: in this process, or as Prefect tasks on a Dask or Ray cluster.

On a cluster every part of every segment is a task of its own. A worker reads what it needs from the storage that all
share, writes there what the part came to, and hands back where that lies. The cluster itself runs the tasks of a lost
worker again; what fails for another reason would only fail again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from orpo_data.parts import PartRun, RunParts, Segment, run_here
from pipelines.recipe import RunnerConfig


@task(name="part", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def run_part(name: str, segment: Segment, run: PartRun, batch_rows: int) -> PartRun:
    """One part through one segment of its stage."""
    run_here(segment, [run], batch_rows, lambda rows: None)
    return run


def run_as_tasks(
    segment: Segment, runs: Sequence[PartRun], batch_rows: int, progress: Callable[[int], None]
) -> Sequence[PartRun]:
    """Every part as a task of the flow that is running."""
    futures = [run_part.submit(f"{run.folder.name}-{segment.number}", segment, run, batch_rows) for run in runs]
    before = {future.task_run_id: run.rows_in for future, run in zip(futures, runs, strict=True)}
    for future in as_completed(futures):
        progress(future.result().rows_in - before[future.task_run_id])
    return [future.result() for future in futures]


def part_runner(config: RunnerConfig) -> RunParts:
    return run_here if config.kind == "local" else run_as_tasks


def task_runner(config: RunnerConfig) -> TaskRunner[Any]:
    """Prefect's task runner for a flow; without an address a cluster on this machine, for as long as the flow runs."""
    if config.kind == "dask":
        from prefect_dask.task_runners import DaskTaskRunner

        return DaskTaskRunner(address=config.address)
    if config.kind == "ray":
        from prefect_ray.task_runners import RayTaskRunner

        runner: TaskRunner[Any] = RayTaskRunner(address=config.address)
        return runner
    return ThreadPoolTaskRunner()
