"""What goes wrong when the Hugging Face hub is asked for something, for all who ask. Import it where that is done."""

from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its HTTP client's, whichever that is

__all__ = ["HUB_ERRORS", "HTTPError", "reason"]

HUB_ERRORS = (OSError, ValueError, HTTPError)
"""No such repository or file, no right to it, no network, a name that cannot be one."""


def reason(error: Exception) -> str:
    """What went wrong on one line: the hub's first line is an address and a number, what is to be done comes later."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
