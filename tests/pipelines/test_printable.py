import re

from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.printable import printable


@given(st.text(st.characters(exclude_characters="\\")))
@example("clear \x1b[2J\x1b]0;owned\x07 hide\rthis \x9b31m \x7f")
def test_nothing_is_left_that_a_terminal_obeys_and_nothing_else_is_touched(text):
    shown = printable(text)
    assert not [c for c in shown if (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160]
    assert re.sub(r"\\x(..)", lambda found: chr(int(found[1], 16)), shown) == text


def test_what_is_written_out():
    assert printable("a\x1b[31mb\r\n\tc\x9b") == "a\\x1b[31mb\\x0d\n\tc\\x9b"
