"""One Prefect server for all tests of the flows, in a temporary home."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

import flows  # noqa: F401  (before prefect: it says what this project wants of Prefect's settings)

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

ROOT = Path(__file__).parents[2]
Process = subprocess.Popen[bytes]


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server over a temporary database; without the heartbeat, which costs a second a flow, and without events: the
    thread that sends them lives on in this process, and its connection draws from `random` beside other tests."""
    from prefect.events.clients import NullEventsClient
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect-home")
    EventsWorker.set_client_override(NullEventsClient)
    with (
        temporary_settings({PREFECT_HOME: home, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield
    EventsWorker.set_client_override(None)


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., "Recipe"]) -> Callable[..., str]:
    """The recipe of `make_recipe` as a file, without a `train` section."""

    def write(*overrides: str) -> str:
        file: Path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        file.write_text(yaml.safe_dump(make_recipe(*overrides).resolved()))
        return str(file)

    return write


@contextmanager
def _machine(folder: Path, *command: str) -> Iterator[Process]:
    """A process with a cache, a working folder and temporary files of its own."""
    for part in ("cache", "tmp"):
        (folder / part).mkdir(parents=True)
    own = {"ORPO_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture
def dask_cluster(tmp_path: Path, prefect_server: None) -> Iterator[tuple[str, list[Process]]]:
    """The address of a Dask scheduler, and its two workers: processes in tmp_path/machines, with the environment as it
    is now (ask for a storage first)."""
    machines, places = tmp_path / "machines", tmp_path / "scheduler.json"
    options = ["--no-dashboard", "--scheduler-file", str(places)]
    with ExitStack() as cluster:
        scheduler = ["distributed.cli.dask_scheduler", "--port", "0", *options]
        cluster.enter_context(_machine(machines / "scheduler", *scheduler))
        worker = ["distributed.cli.dask_worker", "--no-nanny", "--nthreads", "1", *options]
        workers = [cluster.enter_context(_machine(machines / f"worker-{n}", *worker)) for n in range(2)]
        while not places.exists():
            time.sleep(0.1)
        yield json.loads(places.read_text())["address"], workers


@pytest.fixture
def killed_when() -> Callable[[Path, Process], AbstractContextManager[None]]:
    """Within `killed_when(file, process)` the process is killed as soon as the file is there, or the test fails."""

    @contextmanager
    def killing(file: Path, process: Process) -> Iterator[None]:
        done, killed = threading.Event(), []

        def watch() -> None:
            while not done.wait(0.02):
                if file.exists():
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        assert killed == [process.pid]

    return killing
