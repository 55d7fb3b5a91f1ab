"""The command in a process of its own, as users have it: logging, progress, imports."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def own_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object, code: str = "from flows.cli import main; main()") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run
