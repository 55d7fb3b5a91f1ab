"""Words and figures on pages: shortened, escaped, and rounded without lying."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from orpo_data.pages.render import figure, markdown, percent, preview, shorten


def test_shorten_keeps_both_ends():
    assert shorten("a" * 10, 10) == "a" * 10
    assert shorten("a" * 500 + "z" * 500, 10) == "aaaaa … (990 characters left out) … zzzzz"


@given(st.text(max_size=2000), st.integers(1, 200))
def test_a_preview_is_one_short_line(text, limit):
    line = preview(text, limit)
    assert len(line) <= limit + 1
    assert len(line.splitlines()) <= 1
    assert " ".join(text.split()).startswith(line.rstrip("…").rstrip())


@given(st.text())
def test_markdown_renders_as_the_text_itself(read_page, text):
    html = MarkdownIt("commonmark", {"html": True}).enable("table").renderInline(str(markdown(f"x{text}")))
    page = read_page(html)
    assert not page.tags
    assert page.text == " ".join(f"x{text}".replace("\0", "\ufffd").split())


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        *((1, 3, "33.3 %"), (0, 5, "0.0 %"), (5, 5, "100.0 %"), (0, 0, "0.0 %")),
        *((1, 10**6, "< 0.1 %"), (10**6 - 1, 10**6, "99.9 %")),
    ],
)
def test_a_share_is_never_rounded_to_nothing_or_everything(part, whole, text):
    assert percent(part, whole) == text


def test_figures():
    assert [figure(value) for value in (None, 0.0, 4.25, 1 / 3, 12345.6)] == ["-", "0", "4.25", "0.3333", "12,346"]
