"""A job in a process of its own.

Its peak memory is then its own, and what kills it (no memory left, a crash in a library) kills nothing else. The
process ends with the one that started it, however that ends: it watches its standard input, which is closed then.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from orpo_data.errors import OrpoError
from pipelines.compare.plan import Job
from pipelines.recipe import Recipe

_running: set[subprocess.Popen[str]] = set()


def run_apart(job: Job, recipe: Recipe, root: Path) -> dict[str, Any]:
    """`run_job` in another process; OrpoError with its one line where it fails."""
    asked = {"job": job.model_dump(), "recipe": recipe.resolved(), "root": str(root)}
    command = [sys.executable, "-m", "pipelines.compare.apart"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        _running.add(process)
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            told = process.stdout.read().splitlines()
            code = process.wait()
        except BrokenPipeError:
            told, code = [], process.wait()
        finally:
            _running.discard(process)
            process.kill()
    answer: dict[str, Any] = json.loads(told[-1]) if told and code in (0, 1) else {"error": _ending(code)}
    if "error" in answer:
        raise OrpoError(answer["error"])
    return answer


def end_jobs() -> None:
    """End every job that this process has started; whoever waits for one is told so."""
    for process in [*_running]:
        process.kill()


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed: by the system for want of memory, unless it was stopped by hand"
    if code < 0:
        return f"its process ended with signal {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}; what it said stands above"


def main() -> None:
    """Read a job from standard input, do it, and print what came of it as the last line."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("orpo_data", "orpo_train", "pipelines"):
        logging.getLogger(name).setLevel(logging.INFO)
    answer = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    try:
        from pipelines.compare.work import run_job

        recipe = Recipe.parse(asked["recipe"])
        result = run_job(Job.model_validate(asked["job"]), recipe, Path(asked["root"]))
    except (OrpoError, OSError) as error:
        result = {"error": " ".join(str(error).split())}
    print(json.dumps(result), file=answer, flush=True)
    sys.exit("error" in result)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
