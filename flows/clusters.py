"""Where the parts of a stage are worked on: in this process, or as Prefect tasks on a Dask or Ray cluster.

On a cluster every segment of a stage is a task for each part, or for several small ones: a task costs Prefect a third
of a second of processor time, however little it does. A worker reads what it needs from the storage that all share,
writes there what the parts came to, and hands back where that lies. The cluster itself runs the tasks of a lost worker
again; what fails for another reason would only fail again.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from orpo_data.parts import PartRun, RunParts, Segment, run_here
from orpo_data.process import trim
from pipelines.recipe import RunnerConfig

TASK_BYTES = 1 << 28  # that a task reads, about


@task(name="parts", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def run_some(name: str, segment: Segment, runs: Sequence[PartRun], batch_rows: int) -> Sequence[PartRun]:
    """Some parts through one segment of their stage."""
    done = run_here(segment, runs, batch_rows, lambda rows: None)
    trim()  # a worker waits until it is asked again
    return done


def run_as_tasks(
    segment: Segment, runs: Sequence[PartRun], batch_rows: int, progress: Callable[[int], None]
) -> Sequence[PartRun]:
    """All parts, a few at a time, as tasks of the flow that is running."""
    futures = {}
    for some in tasks_of(runs):
        future = run_some.submit(f"{some[0].folder.name}-{segment.number}", segment, some, batch_rows)
        futures[future] = sum(run.rows_in for run in some)
    for future in as_completed(list(futures)):
        progress(sum(run.rows_in for run in future.result()) - futures[future])
    return [run for future in futures for run in future.result()]


def tasks_of(runs: Sequence[PartRun]) -> list[list[PartRun]]:
    """The parts in their order, in tasks of about the same size."""
    sizes = [run.part.size for run in runs]
    total = sum(sizes)
    tasks = max(1, round(total / TASK_BYTES))
    numbers = (before * tasks // (total + 1) for before in accumulate(sizes, initial=0))
    numbered = groupby(zip(numbers, runs, strict=False), key=itemgetter(0))
    return [[run for _, run in some] for _, some in numbered]


def part_runner(config: RunnerConfig) -> RunParts:
    return run_here if config.kind == "local" else run_as_tasks


def task_runner(config: RunnerConfig) -> TaskRunner[Any]:
    """Prefect's task runner for a flow; without an address a cluster on this machine, for as long as the flow runs."""
    if config.kind == "dask":
        from dask import config as dask_config
        from prefect_dask.task_runners import DaskTaskRunner

        if config.address is None:  # Dask would have glibc give back every large array at once and map it anew
            dask_config.get("distributed.nanny.pre-spawn-environ", {}).pop("MALLOC_TRIM_THRESHOLD_", None)
        return DaskTaskRunner(address=config.address)
    if config.kind == "ray":
        from prefect_ray.task_runners import RayTaskRunner

        runner: TaskRunner[Any] = RayTaskRunner(address=config.address)
        return runner
    return ThreadPoolTaskRunner()
