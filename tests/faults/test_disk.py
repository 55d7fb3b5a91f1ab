"""The disk: full, failing, read-only or forbidden at any moment. One clear line, nothing harmed, and on it goes."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import orpo_data

FAULTS = {"full": errno.ENOSPC, "failing": errno.EIO, "read-only": errno.EROFS, "forbidden": errno.EACCES}
OLDER = ["--set", "split.eval_fraction=0.3", "--set", "dedup.near=0.9"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, commands: Any, recipe_yaml: Path) -> dict[str, Any]:
    """An older run, what becomes of it, and how many events that takes."""
    root = tmp_path_factory.mktemp("disk")
    commands.run("prepare", recipe_yaml, "-o", root / "older/run", *OLDER)
    shutil.copytree(root / "older", root / "newer")
    prepared = commands.run("prepare", recipe_yaml, "-o", root / "newer/run", below=root / "newer")
    shutil.copytree(root / "newer", root / "trained")
    trained = commands.run(*train(recipe_yaml, root / "trained"), below=root / "trained")
    return {"root": root, "prepare": prepared.events, "train": trained.events}


def train(recipe: Path, root: Path) -> list[object]:
    return ["train", recipe, "--dataset", root / "run/tokenize", "-o", root / "run"]


def shards(root: Path) -> dict[str, bytes]:
    """Data and weights."""
    files = [*root.rglob("*.arrow"), *root.rglob("*.safetensors")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def assert_sound(root: Path) -> None:
    for manifest in root.rglob("_manifest.json"):
        if ".partial" not in str(manifest):
            assert orpo_data.verify(manifest.parent).ok, manifest


def one_line(printed: str) -> str:
    """What went wrong, without the table of progress before it."""
    assert "Traceback" not in printed, printed
    told = [line for line in printed.splitlines() if line.startswith("orpo: ")]
    assert len(told) == 1, printed
    return told[0]


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.faults)])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_disk_that_fails_on_the_way(
    whole: dict[str, Any], commands: Any, recipe_yaml: Path, tmp_path: Path, command: str, fault: str, count: int
) -> None:
    """From some event on nothing can be written: the command says so, and when the fault is gone it goes on."""
    before, after = ("older", "newer") if command == "prepare" else ("newer", "trained")
    expected = shards(whole["root"] / after)
    for turn in range(count):
        root = shutil.copytree(whole["root"] / before, tmp_path / str(turn))
        arguments = ["prepare", recipe_yaml, "-o", root / "run"] if command == "prepare" else train(recipe_yaml, root)
        at = 1 + int(whole[command] * (turn + 0.5) / count)
        failed = commands.start(*arguments, below=root, fail_at=at, error=FAULTS[fault])
        code = failed.wait()
        if fault == "full" and 0 < turn == count - 1 and code == 0:  # all is written: what is left is to remove
            assert shards(root) == expected
        else:
            assert code == 1, failed.printed
            assert os.strerror(FAULTS[fault]) in one_line(failed.printed)
        assert_sound(root)
        commands.run(*arguments)
        assert shards(root) == expected
        shutil.rmtree(root)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk of its own."""
    place = tmp_path / "disk"

    def mount(options: str) -> Path:
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting takes root")
        return place

    yield mount
    subprocess.run(["umount", place], check=False)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting takes root")
def test_a_small_disk(mounted: Callable[[str], Path], commands: Any, recipe_yaml: Path, whole: dict[str, Any]) -> None:
    """A real file system with too little room, and the same one grown."""
    place = mounted("size=600k")
    failed = commands.start("prepare", recipe_yaml, "-o", place / "run")
    assert failed.wait() == 1, failed.printed
    assert "No space left on device" in one_line(failed.printed)
    assert_sound(place)
    subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
    commands.run("prepare", recipe_yaml, "-o", place / "run")
    expected = {name: data for name, data in shards(whole["root"] / "newer").items() if ".notes" not in name}
    assert {name: data for name, data in shards(place).items() if ".notes" not in name} == expected


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting takes root")
def test_a_read_only_disk(
    mounted: Callable[[str], Path], commands: Any, recipe_yaml: Path, whole: dict[str, Any]
) -> None:
    """What is up to date is said to be; what is not cannot be written."""
    place = mounted("size=64m")
    shutil.copytree(whole["root"] / "trained/run", place / "run")
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    commands.run("verify", place / "run/clean")
    again = commands.run("prepare", recipe_yaml, "-o", place / "run", "--json")
    assert [stage["ran"] for stage in json.loads(again.printed)] == [False] * 6
    assert "unchanged" in commands.run(*train(recipe_yaml, place)).printed
    failed = commands.start("prepare", recipe_yaml, "-o", place / "run", *OLDER)
    assert failed.wait() == 1
    assert "Read-only file system" in one_line(failed.printed)
    assert_sound(place)
