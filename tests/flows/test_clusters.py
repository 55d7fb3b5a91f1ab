"""The parts of a stage on Dask and Ray clusters: other processes, other storage, a killed worker, the same bytes."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import orpo_data
from flows import clusters
from orpo_data.manifest import Shard, read_manifest
from orpo_data.parts import PartRun, ShardPart
from orpo_data.places import is_local, make_folder, send
from orpo_data.schema import PAIRS
from pipelines import prepare
from pipelines.recipe import Recipe, RunnerConfig

STAGES = ("ingest/hh-rlhf", "binarize", "clean", "split", "tokenize")
DIALOGUE = "\n\nHuman: What about case {0}?\n\nAssistant: Case {0} is {1}."
FILES, ROWS = 4, 40


@given(sizes=st.lists(st.integers(0, 3 * clusters.TASK_BYTES) | st.integers(0, 1000)))
def test_parts_are_joined_into_tasks_of_about_the_same_size(sizes: list[int]) -> None:
    shards = [Shard(path="x", split=None, rows=1, tokens=None, bytes=size, sha256="") for size in sizes]
    runs = [PartRun(ShardPart(Path(), shard), Path(), PAIRS, "") for shard in shards]
    tasks = clusters.tasks_of(runs)
    assert [id(run) for some in tasks for run in some] == [id(run) for run in runs]
    assert all(tasks)
    assert len(tasks) <= max(1, sum(sizes) / clusters.TASK_BYTES + 0.5)
    for some in tasks:
        assert sum(run.part.size for run in some[:-1]) < 1.5 * clusters.TASK_BYTES  # even the parts before its last


@pytest.mark.parametrize(("address", "kept"), [(None, False), ("tcp://host:8786", True)])
def test_workers_of_our_own_cluster_keep_the_memory_of_large_arrays(
    address: str | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dask import config as dask_config
    from prefect_dask import task_runners  # noqa: F401 - loads Dask's defaults

    environ = dask_config.get("distributed.nanny.pre-spawn-environ")
    monkeypatch.setitem(environ, "MALLOC_TRIM_THRESHOLD_", 65536)
    clusters.task_runner(RunnerConfig(kind="dask", address=address))
    assert ("MALLOC_TRIM_THRESHOLD_" in environ) == kept


@pytest.fixture(params=["folder", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What all machines see: a folder, or a bucket of an S3 server."""
    place: Path = request.getfixturevalue("s3") if request.param == "s3" else tmp_path / "shared"
    make_folder(place)
    return place


@pytest.fixture
def recipe(tmp_path: Path, shared: Path, make_recipe: Any) -> Callable[[str, Any], Recipe]:
    """Several raw files on the shared storage, so that every stage has several parts; two steps see all of it."""
    (tmp_path / "raw").mkdir()
    for file in range(FILES):
        pairs = [(DIALOGUE.format(f"{file}-{row % 30}", word) for word in ("fine", "bad")) for row in range(ROWS)]
        lines = [json.dumps(dict(zip(("chosen", "rejected"), pair, strict=True))) for pair in pairs]
        (tmp_path / f"raw/{file}.jsonl").write_text("\n".join(lines))
        if not is_local(shared):
            send(tmp_path / f"raw/{file}.jsonl", shared / f"raw/{file}.jsonl")
    path = tmp_path / "raw" if is_local(shared) else f"{shared}/raw/*.jsonl"

    def make(kind: str = "local", address: str | None = None) -> Recipe:
        sources = f"sources=[{{dataset: hh-rlhf, path: '{path}'}}]"
        runner = f"runner={{kind: {kind}, address: {json.dumps(address)}}}"
        made: Recipe = make_recipe(sources, "dedup={}", "label_noise={}", runner)
        return made

    return make


def run(recipe: Recipe, tmp_path: Path, output: Path) -> None:
    from flows.pipeline import prepare_flow

    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.resolved()))
    prepare_flow(str(file), output=str(output))


def assert_the_same_bytes(here: Path, there: Path) -> None:
    """Every shard of every stage, and all that the manifests say of them."""
    for stage in STAGES:
        one, other = read_manifest(here / stage), read_manifest(there / stage)
        assert (one.shards, one.dropped, one.steps) == (other.shards, other.dropped, other.steps), stage
        assert one.content_hash == other.content_hash
        assert orpo_data.verify(there / stage).ok
        for shard in (*one.shards, *one.dropped):
            assert (here / stage / shard.path).read_bytes() == (there / stage / shard.path).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_two_dask_workers_of_which_one_is_killed(
    recipe: Any, tmp_path: Path, shared: Path, dask_cluster: Any, killed_when: Any, monkeypatch: Any
) -> None:
    """When the first parts are being cleaned; every part is a task here."""
    monkeypatch.setattr(clusters, "TASK_BYTES", 1)
    prepare(recipe(), tmp_path / "here")
    address, workers = dask_cluster
    with killed_when(shared / "there/binarize/_manifest.json", workers[0]):
        run(recipe("dask", address), tmp_path, shared / "there")
    assert workers[0].wait(timeout=10) == -signal.SIGKILL
    assert workers[1].poll() is None
    if not is_local(shared):  # each machine has fetched what it needed itself
        assert all(any((tmp_path / f"machines/worker-{n}/cache/files").iterdir()) for n in range(2))
    assert_the_same_bytes(tmp_path / "here", shared / "there")


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_ray_cluster(recipe: Any, tmp_path: Path, shared: Path) -> None:
    """Started by the run on this machine, in processes of its own; a task takes several parts."""
    prepare(recipe(), tmp_path / "here")
    run(recipe("ray"), tmp_path, shared / "there")
    assert_the_same_bytes(tmp_path / "here", shared / "there")
