import socket
from types import SimpleNamespace

import pytest
from prefect.states import Failed

from flows.network import retry_on_network_fault
from orpo_data.errors import OrpoError, UsageError
from orpo_data.network import is_network_fault


class StatusError(OSError):
    """As the HTTP clients raise: the answer is attached."""

    def __init__(self, status):
        super().__init__(f"status {status}")
        self.response = SimpleNamespace(status_code=status)


def caused(error, cause):
    """`error` as it is after `raise error from cause`."""
    error.__cause__ = cause
    return error


def hidden(error, cause):
    """`error` as it is after `raise error from None` while `cause` was handled."""
    error.__context__ = cause
    error.__suppress_context__ = True
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset by peer"),
        TimeoutError("timed out"),
        socket.gaierror(-2, "Name or service not known"),
        StatusError(503),
        StatusError(429),
        caused(OrpoError("foo/bar: not from the hub"), StatusError(500)),
        hidden(OrpoError("cannot open 'foo/bar'"), caused(OSError("We couldn't connect"), ConnectionError("no route"))),
    ],
)
def test_faults_that_may_pass(error):
    assert is_network_fault(error)


@pytest.mark.parametrize(
    "error",
    [
        OrpoError("none.jsonl: no such file"),
        UsageError("clean.ties: unknown"),
        FileNotFoundError("none.jsonl"),
        PermissionError("no"),
        ValueError("bug"),
        StatusError(404),
        StatusError(401),
        caused(OrpoError("foo/bar: no such data set"), StatusError(404)),
        hidden(OrpoError("broken file"), OSError("Input/output error")),
    ],
)
def test_what_the_user_has_to_mend_is_no_fault_of_the_network(error):
    assert not is_network_fault(error)


def test_offline_mode_asked_for_is_no_fault():
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert not is_network_fault(caused(OrpoError("foo/bar: not from the hub"), OfflineModeIsEnabled("offline")))


def test_a_failed_client_without_answer_is_a_fault():
    from huggingface_hub.errors import HTTPError

    assert is_network_fault(caused(OrpoError("not from the hub"), HTTPError("Server disconnected")))


def test_the_condition_reads_the_error_from_the_state_and_tells_it(caplog):
    run = SimpleNamespace(name="ingest-uf")
    assert retry_on_network_fault(None, run, Failed(data=ConnectionError("no route")))
    assert "ingest-uf: the network failed, trying again: no route" in caplog.text
    assert not retry_on_network_fault(None, run, Failed(data=OrpoError("no such file")))
    assert not retry_on_network_fault(None, run, Failed(message="no error attached"))
