import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flows.artifacts import LARGEST_PICTURE, artifact_key, curves_page, drift_page, escape, evaluation_page, stages_page

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
    changed = REPORT | {"ran": False, "dropped": {}, "stage": "a|b", "path": "/runs/x) [y/clean"}
    assert stages_page("run <1>", [REPORT, changed]) == (
        "# run &lt;1&gt;\n\n"
        "| stage | rows in | rows out | dropped | took | content | written to |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| clean | 1,234 | 1,231 | 3 empty\\_turn | 1.2 s | 0123456789ab | runs/x/clean |\n"
        "| a\\|b | 1,234 | 1,231 |  | unchanged | 0123456789ab | /runs/x) \\[y/clean |\n\n"
        f"Reports, on the machine of the run: [clean](file://{Path.cwd()}/runs/x/clean/report.html), "
        "[a\\|b](file:///runs/x%29%20%5By/clean/report.html)\n"
    )


def test_the_page_of_a_difference():
    diff = {
        "new": {"stage": "clean"},
        "rows_same": 1900,
        "rows_changed": 3,
        "why_out": [
            {"step": "clean", "reason": "tie", "rows": 20},
            {"step": None, "reason": None, "rows": 4},
        ],
        "why_in": [{"step": "dedup", "reason": "near_duplicate", "rows": 1}],
        "shifts": [{"column": "margin", "distance": 0.25}],
        "settings": ["clean.ties: keep -> drop"],
    }
    assert drift_page("run <1>", [diff], "too | far") == (
        "# run &lt;1&gt;\n\n"
        "too \\| far\n\n"
        "## clean\n\n"
        "| rows | number | in the other version |\n"
        "| --- | --- | --- |\n"
        "| same | 1,900 |  |\n"
        "| changed | 3 |  |\n"
        "| out | 20 | dropped by clean: tie |\n"
        "| out | 4 | not there |\n"
        "| in | 1 | dropped by dedup: near\\_duplicate |\n\n"
        "| column | moved by |\n"
        "| --- | --- |\n"
        "| margin | 25.0% |\n\n"
        "- clean.ties: keep -&gt; drop\n"
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
