"""One writer at a time: who writes an output folder holds a lock beside it, and others are told who that is.

The lock is the operating system's (`flock`), so it ends with the process that holds it, however that ends: what a dead
process left behind is a file that nobody holds. Where this process cannot write no lock is taken: a run that finds
everything up to date needs none, and any other fails there by itself.
"""

import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from orpo_data.cache import scratch_folder
from orpo_data.errors import OrpoError
from orpo_data.places import is_local

PATIENCE = 2.0
"""Seconds until a run gives up: another may only be looking whether it has anything to do."""

log = logging.getLogger(__name__)


def writing(output: Path) -> AbstractContextManager[None]:
    """Be the only one who writes the folder or file `output`; OrpoError naming the one who does already."""
    if not is_local(output):
        return _holding(_here(output), output)
    return _holding(output.absolute().parent / f".{output.absolute().name}.lock", output)


def running(root: Path) -> AbstractContextManager[None]:
    """Be the only run whose stages lie in the folder `root`; OrpoError naming the one that is there already."""
    return _holding(root / ".run.lock" if is_local(root) else _here(root), root)


def _here(output: Path) -> Path:
    """The lock of an output on a storage: it has none of its own, so only processes of this machine are told apart."""
    return scratch_folder(str(output)).with_suffix(".lock")


@contextmanager
def _holding(place: Path, output: Path) -> Iterator[None]:
    made = not place.parent.exists()
    place.parent.mkdir(parents=True, exist_ok=True)
    file = _acquire(place, output)
    if file is None:
        yield
        return
    try:
        left = file.read()
        if left:
            log.info("%s: the lock was left by %s, which is gone", output, _holder(left))
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_this_process()))
        file.flush()
        yield
    finally:
        place.unlink(missing_ok=True)  # while it is still held, so that it is nobody else's
        file.close()
        if made:
            with suppress(OSError):  # something was written there
                place.parent.rmdir()


def _acquire(place: Path, output: Path) -> IO[str] | None:
    """The lock file, open and held; None in a folder where this process cannot write."""
    given_up = time.monotonic() + PATIENCE
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a link may lead anywhere
            handle = os.open(place, flags, 0o666)
        except OSError:
            if os.access(place.parent, os.W_OK):
                raise
            return None
        file = os.fdopen(handle, "a+", encoding="utf-8", errors="replace")
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file.read())
            file.close()
            if time.monotonic() > given_up:
                raise OrpoError(f"{output}: is being written by {holder}; wait for it, or write elsewhere") from None
            time.sleep(0.05)
            continue
        except BaseException:
            file.close()
            raise
        if place.exists() and os.path.samestat(place.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # its holder removed it just before it was ours


def _this_process() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]),  # options may hold what is nobody's business
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(text: str) -> str:
    """The process that a lock file tells of, for people."""
    try:
        told = json.loads(text)
        return f"process {told['pid']} on {told['host']} ({told['command']}, since {told['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
