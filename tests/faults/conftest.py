"""What tries faults for real: commands in processes of their own, killed or disturbed on the way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml

from pipelines.recipe import Recipe

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


@dataclass
class Child:
    """An `orpo` command that runs."""

    pid: int
    log: Path
    _ask: Callable[..., dict[str, Any]]

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        code: int = self._ask(do="wait", pid=self.pid)["code"]
        return code

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)

    @property
    def printed(self) -> str:
        return self.log.read_text()

    @property
    def events(self) -> int:
        """What it did to files below the folder that was looked at, when it ended by itself."""
        return int(self.printed.rsplit("events ", 1)[1])


class Commands:
    """Starts `orpo` commands in children of a process that has imported everything already."""

    def __init__(self, folder: Path, counter: Path | None) -> None:
        self._folder, self._count = folder, 0
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        if counter:
            environment["LD_PRELOAD"] = str(counter)
        self._process = subprocess.Popen(
            [sys.executable, HERE / "warm.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout
        self._process.stdout.readline()

    def start(
        self,
        *arguments: object,
        below: Path | None = None,
        kill_at: int = 0,
        fail_at: int = 0,
        error: int = 0,
        environment: dict[str, str] | None = None,
    ) -> Child:
        """`below`: count what happens to files there; die at the event `kill_at`, or `error` (an errno) from `fail_at`
        on."""
        self._count += 1
        log = self._folder / f"{self._count}.log"
        order = {
            "do": "start",
            "arguments": list(map(str, arguments)),
            "log": str(log),
            "folder": str(self._folder),
            "below": str(below) if below else "",
            "at": kill_at or fail_at,
            "error": error,
            "environment": environment or {},
        }
        return Child(self._ask(**order)["pid"], log, self._ask)

    def run(self, *arguments: object, **named: Any) -> Child:
        """A command that must end well."""
        child = self.start(*arguments, **named)
        assert child.wait() == 0, child.printed
        return child

    def _ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(120)


@pytest.fixture(scope="session")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that counts events and kills at one of them."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("counter") / "count_writes.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, HERE / "count_writes.c", "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory, counter: Path) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("commands"), counter)
    yield running
    running.close()


@pytest.fixture(scope="session")
def recipe_yaml(
    tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe], tiny_model_dir: Path
) -> Path:
    """A whole pipeline over both raw files, with every step, and a few steps of training."""
    settings = {
        "normalise": "{}",
        "dedup": "{near: 0.65}",
        "label_noise": "{}",
        "train.model": str(tiny_model_dir),
        "train.max_steps": "6",
        "train.batch_size": "4",
        "train.save_every": "2",
        "train.eval_every": "2",
        "train.learning_rate": "0.01",
        "train.precision": "fp32",
        "evaluate.samples": "1",
        "evaluate.max_new_tokens": "4",
    }
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(make_recipe(*map("=".join, settings.items())).resolved()))
    return file


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server of its own; the settings of those who use it, and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    settings = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/api"
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"{url}/health"):
            assert server.poll() is None
            assert time.monotonic() < deadline, (home / "server.log").read_text()
            time.sleep(0.5)
        yield settings | {"PREFECT_API_URL": url, "PID": str(server.pid)}
    finally:
        server.terminate()
        server.wait(30)


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
