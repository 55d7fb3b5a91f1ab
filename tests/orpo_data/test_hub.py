import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from orpo_data.hub import HUB_ERRORS, HTTPError, reason


@pytest.mark.parametrize(
    "kind", [HTTPError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, TimeoutError]
)
def test_what_the_hub_and_its_client_raise(kind):
    assert issubclass(kind, HUB_ERRORS)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError("403 Forbidden: https://hub\n\nSign in first.\n"),
            "OSError: 403 Forbidden: https://hub Sign in first.",
        ),
        (TimeoutError(), "TimeoutError"),
        (ValueError("\n"), "ValueError"),
    ],
)
def test_the_reason_is_one_line(error, line):
    assert reason(error) == line
