"""What a network does: faults that may pass are tried again, files come whole or not at all."""

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from huggingface_hub.errors import OfflineModeIsEnabled

from orpo_data.hub import HTTPError

log = logging.getLogger(__name__)

PAUSES = (1.0, 4.0, 16.0)
"""Seconds before each further try."""

STALL = 120.0
"""Seconds without a byte after which a download counts as failed."""

PASSING_STATUS = {408, 429, 500, 502, 503, 504}
"""HTTP: request timeout, too many requests, and what a server answers while it is out of order."""

T = TypeVar("T")


class CutShortError(ConnectionError):
    """Fewer bytes came than there are."""


def network_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What the clients behind fsspec and the hub raise, as far as they are loaded, and `more`."""
    clients = (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"))
    loaded = [getattr(sys.modules[module], name) for module, name in clients if module in sys.modules]
    return (ConnectionError, TimeoutError, socket.gaierror, HTTPError, *loaded, *more)


def is_network_fault(error: BaseException) -> bool:
    """Whether `error`, or one that led to it, is a fault of the network that may pass."""
    return any(_may_pass(cause) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it was raised from; also where `raise ... from None` hides them from the user."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):  # asked for by the user
        return False
    response = getattr(error, "response", None)  # of httpx, requests and the hub; aiohttp has `status`
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    return status in PASSING_STATUS if status else isinstance(error, network_errors())


def persistently(what: str, call: Callable[[], T]) -> T:
    """What `call` returns; tried again, a few times, after a fault that may pass. `what` is for the log."""
    for pause in PAUSES:
        try:
            return call()
        except network_errors(OSError) as error:
            if not is_network_fault(error):
                raise
            log.warning("%s: %s; trying again in %.0f s", what, type(error).__name__, pause)
        time.sleep(pause)
    return call()


def download(fs: Any, remote: str, copy: Path) -> None:
    """Bring the file `remote` of an fsspec file system here, whole; the last error where that cannot be done."""
    attempts = iter(range(len(PAUSES) + 1))
    try:
        persistently(Path(remote).name, lambda: _download_once(fs, remote, copy, next(attempts)))
    finally:
        for part in copy.parent.glob(f"{copy.name}.*"):
            part.unlink(missing_ok=True)


def _download_once(fs: Any, remote: str, copy: Path, attempt: int) -> None:
    """Into a file of its own first: a try that stalled may still write into the one it had."""
    part, size = copy.with_name(f"{copy.name}.{attempt}"), Future[int | None]()

    def fetch() -> None:
        try:
            expected = fs.size(remote)
            fs.get_file(remote, str(part))
            size.set_result(expected)
        except BaseException as error:  # for the thread that waits
            size.set_exception(error)

    Thread(target=fetch, daemon=True).start()
    expected = _watch(size, part)
    if expected is not None and part.stat().st_size != expected:
        raise CutShortError(f"{part.stat().st_size} bytes came of {expected}")
    os.replace(part, copy)


def _watch(size: "Future[int | None]", part: Path) -> int | None:
    """The size that the file should have, once all of it came; TimeoutError if nothing comes any more."""
    before = -1
    while not wait([size], STALL).done:
        now = part.stat().st_size if part.exists() else 0
        if now == before:
            raise TimeoutError(f"no byte came for {STALL:.0f} s")
        before = now
    return size.result()
