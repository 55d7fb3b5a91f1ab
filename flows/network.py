"""What is worth another try: a fault of the network, and nothing that the user has to mend."""

import logging
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from orpo_data.network import is_network_fault

log = logging.getLogger(__name__)


def retry_on_network_fault(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Prefect's retry condition: `state.data` is the error that the task raised."""
    error = state.data
    retry = isinstance(error, BaseException) and is_network_fault(error)
    if retry:
        log.warning("%s: the network failed, trying again: %s", run.name, " ".join(str(error).split()))
    return retry
