"""What is worth another try: a fault of the network, and nothing that the user has to mend."""

import logging
import socket
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import OfflineModeIsEnabled
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from orpo_data.hub import HTTPError

log = logging.getLogger(__name__)

PASSING_STATUS = {408, 429, 500, 502, 503, 504}
"""HTTP: request timeout, too many requests, and what a server answers while it is out of order."""

NETWORK_ERRORS = (ConnectionError, TimeoutError, socket.gaierror, HTTPError)


def is_network_fault(error: BaseException) -> bool:
    """Whether `error`, or one that led to it, is a fault of the network that may pass."""
    return any(_may_pass(cause) for cause in _causes(error))


def retry_on_network_fault(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Prefect's retry condition: `state.data` is the error that the task raised."""
    error = state.data
    retry = isinstance(error, BaseException) and is_network_fault(error)
    if retry:
        log.warning("%s: the network failed, trying again: %s", run.name, " ".join(str(error).split()))
    return retry


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
    return status in PASSING_STATUS if status else isinstance(error, NETWORK_ERRORS)
