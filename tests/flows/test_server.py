"""A flow on a machine where no Prefect server is configured."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

SCRIPT = """
import sys
from flows import server

start, pids = server._start, []
server._start = lambda *given: pids.append(process := start(*given)) or process
server.start_server_ahead()

from prefect import flow
from prefect.logging import get_run_logger

@flow
def greet():
    get_run_logger().info("the last line")

greet()
print(pids[0].pid, "prefect.server.api.server" in sys.modules)
"""


@pytest.mark.slow
def test_a_server_comes_and_goes_with_the_flow(tmp_path: Path) -> None:
    """The flow's process does not import it, its last line reaches it, and nothing is left running."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment["PREFECT_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    pid, imported = done.stdout.split()
    assert imported == "False"
    assert "Error logging" not in done.stderr
    with closing(sqlite3.connect(tmp_path / "prefect.db")) as database:
        assert ("the last line",) in database.execute("select message from log").fetchall()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
