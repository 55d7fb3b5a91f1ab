"""The tasks as they are declared, and as plain functions: no server."""

import inspect

from prefect import Task
from prefect.cache_policies import NO_CACHE

from flows import pipeline

TASKS = {name: value for name, value in vars(pipeline).items() if isinstance(value, Task)}


def test_there_is_a_task_for_each_stage():
    assert list(TASKS) == ["ingest", "binarize", "clean", "split", "tokenize", "reference", "train", "evaluate"]


def test_the_manifest_decides_what_runs_and_nothing_is_kept_by_prefect():
    assert all(task.cache_policy == NO_CACHE and task.persist_result is False for task in TASKS.values())


def test_only_what_reads_from_the_hub_is_tried_again():
    retried = [name for name, task in TASKS.items() if task.retries]
    assert retried == ["ingest", "tokenize", "reference", "train", "evaluate"]
    assert all(TASKS[name].retry_condition_fn is pipeline.retry_on_network_fault for name in retried)


def test_a_task_is_a_few_lines_around_a_stage_function():
    for task in TASKS.values():
        assert len(inspect.getsource(task.fn).splitlines()) <= 12


def test_a_task_runs_as_a_plain_function(prepared, make_recipe, tmp_path):
    report = pipeline.clean.fn({"path": str(prepared / "binarize")}, make_recipe().resolved(), str(tmp_path / "clean"))
    assert report["path"] == str(tmp_path / "clean")
    assert report["rows_in"] == report["rows_out"] + sum(report["dropped"].values())
