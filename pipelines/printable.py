"""Text of others for a terminal."""

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line


def printable(text: str) -> str:
    """A text whose control characters are written out, so that it cannot clear the screen, set a title or hide a line.

    >>> printable("red: \\x1b[31m")
    'red: \\\\x1b[31m'
    """
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
