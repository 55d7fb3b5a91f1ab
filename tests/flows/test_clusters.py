"""The parts of a stage on a Dask and on a Ray cluster of this machine: other processes, the same bytes."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orpo_data.manifest import read_manifest
from pipelines import prepare
from pipelines.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

DIALOGUE = "\n\nHuman: What about case {0}?\n\nAssistant: Case {0} is {1}."
FILES, ROWS = 6, 40


@pytest.fixture
def recipe(tmp_path: Path, make_recipe: Any) -> Recipe:
    """Several raw files, so that every stage has several parts; with two steps that see the whole dataset."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for file in range(FILES):
        pairs = [(DIALOGUE.format(f"{file}-{row % 30}", word) for word in ("fine", "bad")) for row in range(ROWS)]
        lines = [json.dumps(dict(zip(("chosen", "rejected"), pair, strict=True))) for pair in pairs]
        (raw / f"{file}.jsonl").write_text("\n".join(lines))
    sources = f"sources=[{{dataset: hh-rlhf, path: {raw}}}]"
    made: Recipe = make_recipe(sources, "dedup={}", "label_noise={}")
    return made


def contents(output: Path) -> dict[str, tuple[str, Any]]:
    manifests = [read_manifest(file.parent) for file in sorted(output.rglob("_manifest.json"))]
    return {manifest.stage: (manifest.content_hash, manifest.steps) for manifest in manifests}


def run(recipe: Recipe, tmp_path: Path, output: Path, kind: str, address: str | None) -> None:
    from flows.pipeline import prepare_flow

    file = tmp_path / "recipe.yaml"
    document = recipe.resolved() | {"runner": {"kind": kind, "address": address}}
    file.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))
    prepare_flow(str(file), output=str(output))


def test_two_dask_workers_of_which_one_is_killed(recipe: Recipe, tmp_path: Path) -> None:
    from distributed import LocalCluster

    prepare(recipe, tmp_path / "here")
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        process = next(iter(cluster.workers.values())).pid
        killed: list[int] = []

        def kill_in_the_middle() -> None:
            """When the first parts have been cleaned."""
            while not (tmp_path / "there" / "binarize" / "_manifest.json").exists():
                time.sleep(0.05)
            os.kill(process, signal.SIGKILL)
            killed.append(process)

        watcher = threading.Thread(target=kill_in_the_middle, daemon=True)
        watcher.start()
        run(recipe, tmp_path, tmp_path / "there", "dask", cluster.scheduler_address)
    assert killed
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_ray_cluster(recipe: Recipe, tmp_path: Path) -> None:
    prepare(recipe, tmp_path / "here")
    run(recipe, tmp_path, tmp_path / "there", "ray", None)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
