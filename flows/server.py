"""The Prefect server of a flow: the one that is configured, or one that lives as long as the flow."""

import atexit
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any
from urllib.request import urlopen

from orpo_data.errors import OrpoError

TEMPORARY = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""What sets Prefect's temporary server apart from a lasting one: no pages."""

MOST_SECONDS = 300


def start_server_ahead() -> None:
    """Where no server is configured, start Prefect's temporary one before all else that takes time.

    Prefect starts it too, when a flow first asks for it, and imports the whole server into the flow's process to do so;
    started here, it comes up while the flow's own imports run, and the flow asks for it by its address. It lasts until
    this process ends, because what a flow logs last is sent on the way out.
    """
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    settings = get_current_settings()
    if PREFECT_API_URL.value() or not settings.server.ephemeral.enabled:
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = _start(listener, settings.to_environment_variables(exclude_unset=True))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    at_the_end = ExitStack()
    atexit.register(at_the_end.close)  # before Prefect registers anything, so after all of that
    at_the_end.callback(_stop, process)
    import flows.pipeline  # noqa: F401 - meanwhile

    _wait(process, f"{url}/health")
    at_the_end.enter_context(temporary_settings({PREFECT_API_URL: url}))


def _start(listener: socket.socket, environment: dict[str, Any]) -> subprocess.Popen[bytes]:
    """It takes over a socket that is bound already, so no other program can come between."""
    import prefect

    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent)]
    command += ["--factory", "prefect.server.api.server:create_app", "--fd", str(listener.fileno())]
    command += ["--log-level", "error", "--lifespan", "on"]
    return subprocess.Popen(command, env=os.environ | TEMPORARY | environment, pass_fds=[listener.fileno()])


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    """A busy machine takes its time; a server that died is noticed at once."""
    deadline = time.monotonic() + MOST_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(url, timeout=MOST_SECONDS):
                return
        except OSError:
            time.sleep(0.05)
    raise OrpoError("Prefect's temporary server does not start; `prefect server start` may say why")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
