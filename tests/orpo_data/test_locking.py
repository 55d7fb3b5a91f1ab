"""One writer at a time, told by name; a dead one is in nobody's way."""

import json
import os
import signal
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import pytest

from orpo_data import folders, locking
from orpo_data.errors import OrpoError
from orpo_data.locking import running, writing


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "PATIENCE", 0.0)


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        writing(tmp_path / "out"),
        pytest.raises(OrpoError, match=r"out: is being written by process \d+") as refusal,
        writing(tmp_path / "out"),
    ):
        pass
    assert f"process {os.getpid()} on {socket.gethostname()} (" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with writing(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_others_are_not_in_the_way(tmp_path: Path) -> None:
    with running(tmp_path), writing(tmp_path / "a"), writing(tmp_path / "b"), writing(tmp_path / "a/b"):
        assert (tmp_path / ".run.lock").exists()


def test_a_short_wait_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "PATIENCE", 30.0)
    seen: list[str] = []

    def second() -> None:
        with writing(tmp_path / "out"):
            seen.append("second")

    with writing(tmp_path / "out"):
        thread = Thread(target=second)
        thread.start()
        thread.join(0.2)
        seen.append("first")
    thread.join()
    assert seen == ["first", "second"]


def test_the_lock_of_a_killed_process_is_nobodys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if (child := os.fork()) == 0:
        with writing(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / ".out.lock").read_text())["pid"] == child
    caplog.set_level("INFO")
    with writing(tmp_path / "out"):
        assert json.loads((tmp_path / ".out.lock").read_text())["pid"] == os.getpid()
    assert f"the lock was left by process {child} on" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["", "{", "[]", "\x00\xff"])
def test_what_somebody_else_left_there_is_no_lock(tmp_path: Path, left: str) -> None:
    (tmp_path / ".out.lock").write_text(left, "latin-1" if "\xff" in left else "utf-8")
    with writing(tmp_path / "out"):
        pass


def test_options_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/orpo", "prepare", "--set", "token=hunter2"])
    with writing(tmp_path / "out"):
        assert "hunter2" not in (tmp_path / ".out.lock").read_text()


@pytest.mark.parametrize(("mode", "held"), [(0o555, False), (0o777, True)])
def test_where_nobody_can_write_no_lock_is_needed(mode: int, held: bool) -> None:
    """But a lock of another user's, in a folder that both can write, is to be respected."""
    with TemporaryDirectory() as folder:
        lock = Path(folder) / ".out.lock"
        lock.touch(0o444)
        Path(folder).chmod(mode)
        if (child := os.fork()) == 0:
            code = 2
            try:
                if os.geteuid() == 0:
                    os.setuid(65_534)  # root can write everywhere
                with writing(Path(folder) / "out"):
                    code = 0
            except PermissionError:
                code = 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == held
        Path(folder).chmod(0o700)


@pytest.mark.parametrize("can", [True, False])
def test_a_newer_folder_takes_the_place_of_an_older_one(
    tmp_path: Path, can: bool, monkeypatch: pytest.MonkeyPatch, toys: Any
) -> None:
    """With or without a system call that exchanges two names."""
    if not can:
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    for version in ("1", "2"):
        toys.run(tmp_path / "out", [toys.part(version, (1, 2, 3))], [("without", 2)], batch_rows=5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exchange(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not folders._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot exchange two names")
    assert (tmp_path / "a/b").exists()
    assert (tmp_path / "b/a").exists()
    assert not folders._exchange(tmp_path / "a", tmp_path / "absent")
