"""Jobs in processes of their own: what they return, how they fail, that none outlives what started it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_data.errors import OrpoError
from pipelines.compare import apart
from pipelines.compare.apart import end_jobs, run_apart
from pipelines.compare.plan import Job
from pipelines.compare.work import run_job

SFT = Job(name="sft,seed=1", method="sft", seed=1)


def program(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let `code` be what a job's process runs."""
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", code], **more))


def test_a_job_trains_once_and_says_what_it_cost(comparing, own_run):
    first = run_apart(SFT, comparing(), own_run)
    assert first["ran"]
    assert first["path"] == str(own_run / "compare/sft,seed=1/model")
    assert first["cost"]["seconds"] > 0
    assert first["cost"]["peak_bytes"] > 0
    again = run_job(SFT, comparing(), own_run)
    assert not again["ran"]
    assert again["cost"] == first["cost"]
    assert again["content_hash"] == first["content_hash"]


def test_a_job_that_fails_says_why_in_its_one_line(comparing, tmp_path):
    with pytest.raises(OrpoError, match=r"^.*tokenize.* is no dataset folder|tokenize") as caught:
        run_apart(SFT, comparing(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed: by the system for want of memory"),
        ("import os; os.kill(os.getpid(), 11)", "ended with signal SIGSEGV"),
        ("import sys; input(); sys.exit(3)", "ended with exit code 3"),
        ("raise ValueError('a bug')", "ended with exit code 1"),
        ("pass", "ended with exit code 0"),
    ],
)
def test_a_process_that_dies_is_one_line(comparing, tmp_path, monkeypatch, code, says):
    program(monkeypatch, code)
    with pytest.raises(OrpoError, match=says):
        run_apart(SFT, comparing(), tmp_path)


def test_what_a_library_prints_is_no_answer(comparing, tmp_path, monkeypatch):
    program(monkeypatch, "input(); print('hello'); print('{\"path\": \"x\"}')")
    assert run_apart(SFT, comparing(), tmp_path) == {"path": "x"}


def test_jobs_that_run_can_be_ended(comparing, tmp_path, monkeypatch):
    from threading import Timer

    program(monkeypatch, "import time; time.sleep(60)")
    Timer(0.5, end_jobs).start()
    started = time.monotonic()
    with pytest.raises(OrpoError, match="was killed"):
        run_apart(SFT, comparing(), tmp_path)
    assert time.monotonic() - started < 30
    assert not apart._running


def test_a_job_ends_with_the_process_that_started_it(tmp_path):
    """Killed outright, the starting process can tell nobody; its end of the pipe closes."""
    file = tmp_path / "pid"
    child = (
        "import os, threading, time; from pathlib import Path; from pipelines.compare.apart import _end_with_parent; "
        "threading.Thread(target=_end_with_parent, daemon=True).start(); "
        f"Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE).wait()"
    )
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        _wait_until(lambda: file.exists() and file.read_text())
        process.kill()
    number = int(file.read_text())
    _wait_until(lambda: not _lives(number))


def _wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(number: int) -> bool:
    status = Path(f"/proc/{number}/status")
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return not (status.exists() and "State:\tZ" in status.read_text())
