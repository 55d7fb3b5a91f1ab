"""Killed anywhere: run again, every byte of data, weights and lineage is that of a run that nobody disturbed.

SIGKILL comes at a chosen event among all that a command does to files (a write is torn in the middle, a rename, a
removal or a new file does not happen any more), or at a random time.
"""

import json
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import orpo_data
from orpo_data.errors import OrpoError
from orpo_data.events import EVENTS_NAME
from orpo_data.manifest import MANIFEST_NAME

KILLED = -9
OLDER = ["--set", "split.eval_fraction=0.3", "--set", "clean.identical_pair=flag", "--set", "dedup.near=0.9"]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, commands: Any, recipe_yaml: Path) -> dict[str, Any]:
    """Runs that nobody disturbed, an older one to be replaced, and how many events each command takes."""
    root = tmp_path_factory.mktemp("whole")
    commands.run("prepare", recipe_yaml, "-o", root / "older/run", *OLDER)
    shutil.copytree(root / "older", root / "again")
    prepared = commands.run("prepare", recipe_yaml, "-o", root / "fresh/run", below=root / "fresh")
    again = commands.run("prepare", recipe_yaml, "-o", root / "again/run", below=root / "again")
    shutil.copytree(root / "fresh", root / "trained")
    trained = commands.run(*train(recipe_yaml, root / "trained"), below=root / "trained")
    return {"root": root, "fresh": prepared.events, "again": again.events, "trained": trained.events}


def train(recipe: Path, root: Path) -> list[object]:
    return ["train", recipe, "--dataset", root / "run/tokenize", "-o", root / "run"]


def contents(root: Path) -> dict[str, Any]:
    """Every file below a folder; of lineage and manifests what does not follow from the clock and the place."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): _content(path) for path in files}


def _content(path: Path) -> Any:
    if path.name == EVENTS_NAME:
        return _events(path)
    if path.name == MANIFEST_NAME:
        document = json.loads(path.read_text())
        del document["checksum"], document["files"][EVENTS_NAME]
        return document
    return path.read_bytes()


def _events(path: Path) -> list[Any]:
    """Of the last run; runs before it were killed, so only their beginning is on record."""
    events = [json.loads(re.sub(r'"/[^"]*?/run/', '"ROOT/run/', line)) for line in path.read_text().splitlines()]
    run = events[-1]["run"]["runId"]
    before = [event for event in events if event["run"]["runId"] != run]
    assert all(event["eventType"] == "START" for event in before)
    own = [event for event in events if event["run"]["runId"] == run]
    for event in own:
        del event["eventTime"], event["run"]["runId"]
    return own


def assert_no_half_written_folder_opens(root: Path) -> None:
    for folder in {path.parent for path in root.rglob("*") if path.is_file()}:
        if (folder / MANIFEST_NAME).exists() and ".partial" not in str(folder):
            assert orpo_data.verify(folder).ok, folder
        else:
            try:
                orpo_data.load(folder)
            except OrpoError:
                continue
            assert orpo_data.verify(folder).ok, f"{folder} opens, but it is not whole"


def points(count: int, events: int, seed: int) -> list[int]:
    """Spread over all events, the first and the last among them."""
    draw = random.Random(seed)
    step = events / count
    return [1, *(int(step * i + draw.random() * step) + 1 for i in range(1, count - 1)), events][:count]


COUNTS = [pytest.param(3, id="3"), pytest.param(70, id="70", marks=pytest.mark.faults)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("over", ["fresh", "again"])
def test_prepare(
    whole: dict[str, Any], commands: Any, recipe_yaml: Path, tmp_path: Path, over: str, count: int
) -> None:
    """Into an empty folder, and over the output of an older recipe, of which parts are taken over."""
    expected = contents(whole["root"] / over)
    for point in points(count, whole[over], seed=count):
        root = tmp_path / str(point)
        if over == "again":
            shutil.copytree(whole["root"] / "older", root)
        killed = commands.start("prepare", recipe_yaml, "-o", root / "run", below=root, kill_at=point)
        assert killed.wait() == KILLED, killed.printed
        assert_no_half_written_folder_opens(root)
        commands.run("prepare", recipe_yaml, "-o", root / "run")
        assert contents(root) == expected, point
        shutil.rmtree(root)


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.faults)])
def test_training(whole: dict[str, Any], commands: Any, recipe_yaml: Path, tmp_path: Path, count: int) -> None:
    """Also inside checkpoints, and while the model is saved."""
    expected = contents(whole["root"] / "trained")
    for point in points(count, whole["trained"], seed=count):
        root = shutil.copytree(whole["root"] / "fresh", tmp_path / str(point))
        killed = commands.start(*train(recipe_yaml, root), below=root, kill_at=point)
        assert killed.wait() == KILLED, killed.printed
        assert_no_half_written_folder_opens(root)
        commands.run(*train(recipe_yaml, root))
        assert contents(root) == expected, point
        shutil.rmtree(root)


@pytest.mark.faults
def test_at_random_times(whole: dict[str, Any], commands: Any, recipe_yaml: Path, tmp_path: Path) -> None:
    """Wherever it is then: in a computation, too; twice over before it may finish."""
    draw, expected = random.Random(1), contents(whole["root"] / "trained")
    for point in range(20):
        root = tmp_path / str(point)
        for arguments, seconds in (
            (["prepare", recipe_yaml, "-o", root / "run"], 2.0),
            (train(recipe_yaml, root), 4.0),
        ):
            for _ in range(2):
                killed = commands.start(*arguments)
                time.sleep(draw.random() * seconds)
                killed.kill()
                assert killed.wait() in (KILLED, 0)
                assert_no_half_written_folder_opens(root)
            commands.run(*arguments)
        assert contents(root) == expected, point
        shutil.rmtree(root)


# --- as a Prefect flow ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.faults)])
def test_a_flow(
    prefect_server: dict[str, str], whole: dict[str, Any], commands: Any, recipe_yaml: Path, tmp_path: Path, count: int
) -> None:
    """`orpo run`: killed inside its tasks, run again as the same flow."""
    run = ["run", recipe_yaml, "--output"]
    expected = contents(whole["root"] / "trained")
    counted = commands.run(*run, tmp_path / "0/run", below=tmp_path / "0", environment=prefect_server)
    judged = contents(tmp_path / "0")
    assert {name: judged[name] for name in expected} == expected  # the same bytes as by the command line
    for point in points(max(count, 2), counted.events, seed=count)[-count:]:
        root = tmp_path / str(point)
        killed = commands.start(*run, root / "run", below=root, kill_at=point, environment=prefect_server)
        if (code := killed.wait()) != KILLED:  # a flow has an event more or less at times: the last may never come
            assert code == 0, killed.printed
            assert killed.events < point
        assert_no_half_written_folder_opens(root)
        commands.run(*run, root / "run", environment=prefect_server)
        assert contents(root) == judged, point
        shutil.rmtree(root)
