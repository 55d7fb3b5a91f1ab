"""Long runs: a schedule in fast time, with faults between: nothing leaks beyond stated bounds."""

import gc
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orpo_data
from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from orpo_train import loop
from pipelines import prepare
from pipelines.recipe import Recipe
from pipelines.training import train_model

MEGABYTES_A_RUN = 0.5
"""How much the memory of a process may grow with each run of the whole data part, once it is warm."""

ROWS_A_FLOW = 400
"""How many rows a flow of ten tasks may leave in Prefect's database: states, logs, events, artifacts."""

MEGABYTES_A_FLOW = 1.0
"""How much the process that serves flows, and Prefect's server, may grow with each."""

FLOWS = 60


def resident(pid: int | str = "self") -> float:
    """Megabytes of a process in memory."""
    gc.collect()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def held() -> tuple[int, int, int]:
    """Open files, threads, and entries of the folder for temporary files."""
    files = len(os.listdir("/proc/self/fd"))
    return files, threading.active_count(), len(os.listdir(tempfile.gettempdir()))


def break_something(root: Path, draw: random.Random) -> None:
    """As rot, a crash or a colleague would: a shard's bit, a lost folder, a half-written one, a lock left behind."""
    kind = draw.randrange(5)
    if kind == 0:
        shard = draw.choice(sorted(root.rglob("*.arrow")))
        content = shard.read_bytes()
        shard.unlink()  # a hard link may share its bytes
        shard.write_bytes(content[:-1] + b"\x7f")
    elif kind == 1:
        shutil.rmtree(root / draw.choice(["clean", "split", "tokenize"]))
    elif kind == 2:
        shutil.copytree(root / "clean", root / ".split.partial", dirs_exist_ok=True)
    elif kind == 3:
        (root / ".clean.lock").write_text('{"pid": 1}')


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("runs", [6, pytest.param(500, marks=pytest.mark.faults)])
def test_the_data_part_again_and_again(
    own_raw_data: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, runs: int
) -> None:
    """One process, new rows every time, a fault after every other run; what is left is one run's output."""
    draw, recipe, root = random.Random(runs), make_recipe("dedup={near: 0.65}", raw=own_raw_data), tmp_path / "run"
    warm, told = runs // 3, list[str]()
    for turn in range(runs):
        if turn == warm:
            memory, before = resident(), held()
        with (own_raw_data / "hh/train.jsonl").open("a") as file:
            sides = [f"\n\nHuman: Number {turn}?\n\nAssistant: {word} {turn}." for word in ("Yes", "No")]
            file.write(json.dumps(dict(zip(("chosen", "rejected"), sides, strict=True))) + "\n")
        try:
            prepare(recipe, root)
        except OrpoError as error:  # a shard of an input that stands: the line says which folder to make again
            told.append(str(error))
            shutil.rmtree(root)
            prepare(recipe, root)
        assert orpo_data.verify(root / "tokenize").ok
        if turn % 2:
            break_something(root, draw)
    assert all("its bytes changed" in line for line in told)
    files, threads, temporary = (now - then for now, then in zip(held(), before, strict=True))
    assert files <= 4
    assert threads <= 4
    assert temporary <= 4
    assert resident() - memory < 60 + MEGABYTES_A_RUN * (runs - warm)
    hidden = {path.name for path in root.iterdir() if path.name.startswith(".")}
    assert hidden <= {".clean.notes", ".split.notes", ".split.partial", ".clean.lock", ".run.lock"}
    assert len(list((root / ".clean.notes").iterdir())) < 20 if (root / ".clean.notes").exists() else True


class Watched:
    """A process that is meant to run for months."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._files, self._memory = self.files, resident(pid)

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self._pid}/fd"))

    def grown(self) -> tuple[float, int]:
        """Megabytes and open files, since it was first looked at."""
        return resident(self._pid) - self._memory, self.files - self._files


@pytest.mark.faults
def test_an_hours_schedule_in_fast_time(
    prefect_server: dict[str, str], commands: Any, recipe_yaml: Path, tmp_path: Path
) -> None:
    """`orpo serve` starts a flow every few seconds; some are killed, and what others left is broken.

    Neither the process that serves them nor Prefect's server grows beyond bounds, nor the database, nor what lies in
    the folders.
    """
    draw, database, root = random.Random(1), Path(prefect_server["PREFECT_HOME"]) / "prefect.db", tmp_path / "run"
    settings = ["-o", root, "--set", "train=null"]
    commands.run("run", recipe_yaml, *settings, environment=prefect_server)
    (tmp_path / "tmp").mkdir()
    environment = os.environ | prefect_server | {"TMPDIR": str(tmp_path / "tmp"), "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
    orpo = [sys.executable, "-c", "from flows.cli import main; main()", "serve", recipe_yaml, *settings]
    server, kills, watched, begun = int(prefect_server["PID"]), 0, list[Watched](), 0
    with (tmp_path / "log").open("w") as log:
        serving = subprocess.Popen(
            [*orpo, "--cron", "* * * * * */10"], env=environment, stdout=log, stderr=log, cwd=Path(__file__).parents[2]
        )
    try:
        while (flows := _ended(database)) < FLOWS:
            assert serving.poll() is None, (tmp_path / "log").read_text()
            if flows >= FLOWS // 3 and not watched:
                watched, begun = [Watched(serving.pid), Watched(server)], _rows(database)
            time.sleep(5 + 10 * draw.random())
            if running := _children(serving.pid):
                if draw.random() < 0.2:
                    os.kill(draw.choice(running), signal.SIGKILL)
                    kills += 1
            else:
                break_something(root, draw)
        grown = [process.grown() for process in watched]
        rows = _rows(database) - begun
    finally:
        serving.send_signal(signal.SIGINT)
        serving.wait(60)
    print(f"{flows} flows, {kills} killed; megabytes and files more, serving and server: {grown}; {rows} rows")
    shutil.rmtree(root)  # a shard of an input that stands may be broken
    commands.run("run", recipe_yaml, *settings, environment=prefect_server)
    assert orpo_data.verify(root / "tokenize").ok
    assert kills > FLOWS / 20
    for megabytes, files in grown:
        assert megabytes < 60 + MEGABYTES_A_FLOW * FLOWS
        assert files < 20
    assert rows / (flows - FLOWS // 3) < ROWS_A_FLOW
    assert len(list((tmp_path / "tmp").iterdir())) <= kills + 4


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ended(database: Path) -> int:
    """Flows that are over, however they ended."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60) as connection:
        over = "('COMPLETED', 'FAILED', 'CRASHED', 'CANCELLED')"
        found: int = connection.execute(f"select count(*) from flow_run where state_type in {over}").fetchone()[0]
        return found


def _rows(database: Path) -> int:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60) as connection:
        names = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        return sum(connection.execute(f'select count(*) from "{name}"').fetchone()[0] for name in names)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at it tells an earlier hour."""
    hours = iter(range(2_000_000_000, 0, -3_600))
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))


def age(folder: Path) -> None:
    """What was written last is the oldest."""
    for n, file in enumerate(sorted(folder.rglob("*"), key=lambda file: file.stat().st_mtime_ns)):
        os.utime(file, (10**9 - 3_600 * n,) * 2)


@pytest.mark.usefixtures("clock")
def test_the_data_part_by_a_clock_that_goes_backwards(
    make_recipe: Callable[..., Recipe], prepared: Path, tmp_path: Path
) -> None:
    """Nothing hangs on the time of day, in any stage: the same bytes, and what is unchanged is still told."""
    for report in prepare(make_recipe(), tmp_path / "run"):
        assert report.ran
        assert report.content_hash == read_manifest(prepared / report.path.relative_to(tmp_path / "run")).content_hash
    age(tmp_path / "run")
    assert not any(report.ran for report in prepare(make_recipe(), tmp_path / "run"))
    shutil.rmtree(tmp_path / "run/clean")
    assert [report.stage for report in prepare(make_recipe(), tmp_path / "run") if report.ran] == ["clean"]


class PowerCut(BaseException):
    """No code of ours catches this."""


@pytest.mark.usefixtures("clock")
def test_training_by_a_clock_that_goes_backwards(
    trained: Any, prepared: Path, tiny_training: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on from the checkpoint of the last step, the oldest by its time, and ends in the same weights."""
    save, resumed = loop.save_checkpoint, []

    def save_and_die(root: Path, step: int, *rest: Any, **named: Any) -> None:
        save(root, step, *rest, **named)
        if step == 4:
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_and_die)
        with pytest.raises(PowerCut):
            train_model(prepared / "tokenize", tiny_training(), tmp_path / "model", job="test")
    age(tmp_path)
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda root, step, *r, **n: (resumed.append(step), save(root, step, *r, **n))
    )
    report = train_model(prepared / "tokenize", tiny_training(), tmp_path / "model", job="test")
    assert resumed == [6]
    assert report.content_hash == trained.content_hash
    age(tmp_path)
    assert not train_model(prepared / "tokenize", tiny_training(), tmp_path / "model", job="test").ran
