import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flows.artifacts import LARGEST_PICTURE, artifact_key, curves_page, escape, evaluation_page, stages_page

REPORT = {
    "stage": "clean",
    "path": "runs/x/clean",
    "content_hash": "0123456789abcdef",
    "rows_in": 1234,
    "rows_out": 1231,
    "dropped": {"empty_turn": 3},
    "ran": True,
    "why": "no output yet",
    "seconds": 1.25,
}


@given(st.text())
@example("Ünïcode_RUN v2.0")
def test_keys_are_lower_case_digits_and_dashes(name):
    assert re.fullmatch(r"([a-z0-9]+-)*stages", artifact_key(name, "stages"))


@given(st.text())
@example('<img src=x onerror="alert(1)">')
@example("a | b\n| c | d |")
@example("[x](javascript:alert(1)) `code` **bold** \\")
def test_escaped_text_is_one_line_without_markup(text):
    safe = escape(text)
    assert len(safe.splitlines()) <= 1
    assert not re.search(r"[<>]", safe)
    assert not re.search(r"[`*_\[\]!|~]", re.sub(r"\\[\\`*_\[\]!|~]", "", safe))


def test_the_page_of_the_stages():
    changed = REPORT | {"ran": False, "dropped": {}, "stage": "a|b"}
    assert stages_page("run <1>", [REPORT, changed]) == (
        "# run &lt;1&gt;\n\n"
        "| stage | rows in | rows out | dropped | took | content | written to |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| clean | 1,234 | 1,231 | 3 empty\\_turn | 1.2 s | 0123456789ab | runs/x/clean |\n"
        "| a\\|b | 1,234 | 1,231 |  | unchanged | 0123456789ab | runs/x/clean |\n"
    )


@pytest.mark.parametrize(("before", "cell"), [({"nll": 2.5}, "2.5000"), (None, "")])
def test_the_page_of_an_evaluation(before, cell):
    evaluation = REPORT | {"result": {"pairs": 1500, "before": before, "after": {"nll": 2.25}}}
    page = evaluation_page("run", REPORT, evaluation)
    assert "| 1,500 held-out pairs | before | after |" in page
    assert f"| nll | {cell} | 2.2500 |" in page
    assert "| model | runs/x/clean | 0123456789ab |" in page


def test_the_page_of_the_curves_holds_the_picture(tmp_path):
    picture = tmp_path / "curves.png"
    picture.write_bytes(b"\x89PNG tiny")
    embedded = "![Training curves](data:image/png;base64,iVBORyB0aW55)"
    assert curves_page("My run", picture) == f"# My run\n\n{embedded}\n\n{escape(picture)}\n"


@pytest.mark.parametrize(("size", "shown"), [(LARGEST_PICTURE, True), (LARGEST_PICTURE + 1, False)])
def test_a_large_picture_stays_out_of_prefects_database(tmp_path, size, shown):
    picture = tmp_path / "curves.png"
    picture.write_bytes(b"x" * size)
    assert ("data:image" in curves_page("My run", picture)) is shown
