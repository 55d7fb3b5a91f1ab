"""A command in a fresh process of its own: what it printed, how long it took, and the memory of its process tree."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from orpo_data.errors import OrpoError

ROOT = Path(__file__).parents[1]
ORPO = "from flows.cli import main; main()"  # what the `orpo` script runs
SAMPLE_EVERY = 0.1  # seconds between looks at the memory, each of which takes a few milliseconds


@dataclass(frozen=True)
class Finished:
    """A process that ended well; memory in bytes, of the process and all its children, 0 if nobody looked."""

    output: str  # stdout
    seconds: float  # from before its start to its end
    cpu_seconds: float  # user and system time, with that of the children it waited for
    peak: int  # resident, with pages of memory-mapped files
    peak_private: int  # resident, without them

    @property
    def answer(self) -> Any:
        """Its last line, read as JSON."""
        return json.loads(self.output.splitlines()[-1])


def ask(module: str, question: Any, environment: Mapping[str, str] | None = None, remedy: str = "") -> Finished:
    """Run a module that reads `question()` and prints its answer as the last line; `remedy` is for want of memory."""
    return _run(module, [sys.executable, "-m", module, json.dumps(question)], environment or {}, remedy=remedy)


def orpo(
    *arguments: str, environment: Mapping[str, str] | None = None, watch_memory: bool = False, before: str = ""
) -> Finished:
    """Run a command of this project as a user does, from the start of its interpreter; `before` is Python for it."""
    command = [sys.executable, "-c", f"{before}\n{ORPO}", *arguments]
    return _run(f"orpo {arguments[0]}", command, environment or {}, watch_memory=watch_memory)


def _run(
    name: str, command: Sequence[str], environment: Mapping[str, str], *, watch_memory: bool = False, remedy: str = ""
) -> Finished:
    """Run a command to its end and tell how long it took; OrpoError if it fails, with what it wrote to stderr."""
    before, start = _ended_cpu_seconds(), time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment}, cwd=ROOT
    ) as process:
        memory = _Memory(process.pid, watch=watch_memory)
        output, errors = process.communicate()
        seconds = time.perf_counter() - start
        memory.stop()
    if process.returncode == -signal.SIGKILL:
        raise OrpoError(f"{name} was killed, most likely for want of memory{remedy and ': '}{remedy}")
    if process.returncode:
        raise OrpoError(f"{name} failed:\n{errors[-4000:]}")
    print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return Finished(output, seconds, _ended_cpu_seconds() - before, memory.peak, memory.peak_private)


def question() -> Any:
    """What `ask` gave this process."""
    return json.loads(sys.argv[1])


@dataclass
class Stopwatch:
    """Wall and CPU time of what runs in its `with`; used again, it goes on from where it was."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # user and system time of this process and of all its children
    user_seconds: float = 0.0

    def __enter__(self) -> Self:
        self._started = _clocks()
        return self

    def __exit__(self, *error: object) -> None:
        seconds, user, system = (now - then for now, then in zip(_clocks(), self._started, strict=True))
        self.seconds += seconds
        self.cpu_seconds += user + system
        self.user_seconds += user


def _clocks() -> tuple[float, float, float]:
    """Wall, user and system time; that of children that still run in hundredths of a second."""
    now = time.perf_counter()
    running = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    known = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    user = sum(usage.ru_utime for usage in known) + sum(times.user for times in running)
    return now, user, sum(usage.ru_stime for usage in known) + sum(times.system for times in running)


def use_cores(count: int) -> None:
    """Keep this process, and all that it starts, on that many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _ended_cpu_seconds() -> float:
    """Of the children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class _Memory:
    """Looks at a process tree's resident memory at short intervals, in a thread."""

    def __init__(self, pid: int, *, watch: bool) -> None:
        self.peak = self.peak_private = 0
        self._ended = threading.Event()
        if not watch:
            self._ended.set()
        self._thread = threading.Thread(target=self._watch, args=[psutil.Process(pid)])
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self, root: psutil.Process) -> None:
        while not self._ended.wait(SAMPLE_EVERY):
            sizes = [size for process in _tree(root) if (size := _resident(process))]
            self.peak = max(self.peak, sum(resident for resident, _ in sizes))
            self.peak_private = max(self.peak_private, sum(resident - shared for resident, shared in sizes))


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> tuple[int, int] | None:
    """Resident bytes, and those of them that are shared with files; None if the process is gone."""
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return None
    return memory.rss, memory.shared
