"""Pages: hostile text does nothing in reports, cards and Prefect's artifacts: in a real browser, links read too."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from markdown_it import MarkdownIt

from flows.artifacts import drift_page, evaluation_page, stages_page
from pipelines import prepare
from pipelines.recipe import Recipe

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


class Sentinel(ThreadingHTTPServer):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Sentinel

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(204)
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def sentinel() -> Iterator[Sentinel]:
    with Sentinel() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Path], str]:
    """The document of a page after its scripts ran, by the browser."""

    def run(page: Path) -> str:
        assert CHROMIUM
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        command = [CHROMIUM, *flags, f"file://{page}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


def attacks(server: str) -> list[str]:
    """Each would show itself by a request, by another title, or by a link that runs."""
    return [
        f"</script><script>document.title='owned';fetch('{server}/fetch')</script>",
        f"<img src=x onerror=\"document.title='owned'\"><img src='{server}/img'>",
        "<svg onload=\"document.title='owned'\"></svg>",
        f"![]({server}/markdown-image) [x](javascript:document.title='owned') <javascript:alert(1)>",
        f"[a]: {server}/ref\n![a]\n\n| a | b |\n|---|---|\n| ![]({server}/cell) | `x` |",
        "```\n</pre><script>document.title='owned'</script>\n```\n~~~",
        "--- \ntitle: owned\n---\n# owned\n[x](data:text/html,<script>alert(1)</script>)",
        f"<iframe src='{server}/frame'></iframe><link rel=stylesheet href='{server}/sheet'>",
        f"<form id=f action='{server}/form'></form><script>f.submit()</script><base href='{server}/'>",
        "\u202e<!-- --!><math><a xlink:href=javascript:alert(1)>x</a></math>",
    ]


def as_html(markdown: str, place: Path) -> Path:
    """As the most trusting reader of markdown shows it: HTML passes."""
    body = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.S))
    )
    place.write_text(f"<!doctype html><meta charset=utf-8><title>page</title>{body}")
    return place


def assert_harmless(page: Path, opened: Callable[[Path], str], sentinel: Sentinel) -> None:
    document = opened(page)
    title = re.search("<title>(.*?)</title>", document, re.S)
    assert title
    assert title[1].strip() != "owned"
    links = re.findall(r'(?:href|src|action)\s*=\s*"([^"]*)"', document)
    assert not [link for link in links if re.match(r"\s*(javascript|vbscript|data:text/html)", link, re.I)], page
    assert sentinel.asked == [], page


@pytest.mark.slow
def test_the_pages_of_a_hostile_dataset(
    make_recipe: Callable[..., Recipe], tmp_path: Path, opened: Callable[[Path], str], sentinel: Sentinel
) -> None:
    """Reports and cards of every stage, whose rows, file and recipe are hostile."""
    texts = attacks(sentinel.url)
    rows = [
        {"prompt": f"{i} {t}", "chosen": f"yes {t}", "rejected": f"no {t}", "m": t} for i, t in enumerate(texts * 4)
    ]
    folder = tmp_path / "<img src=x onerror=document.title=1>"
    folder.mkdir()
    (folder / "a <b>.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = json.dumps([{"dataset": "pairs", "path": str(folder)}])
    name = json.dumps("<img src=x onerror=\"document.title='owned'\">")
    clean = json.dumps({"personal_data": "flag", "repetition": "flag"})
    overrides = (f"sources={source}", f"name={name}", f"clean={clean}", "tokenize.control_text=flag", "dedup={}")
    prepare(make_recipe(*overrides, "tokenize.max_length=400", "tokenize.max_prompt_length=300"), tmp_path / "run")
    reports = sorted((tmp_path / "run").rglob("report.html"))
    assert len(reports) == 5
    for report in reports:
        assert_harmless(report, opened, sentinel)
        card = (report.parent / "README.md").read_text()
        assert_harmless(as_html(card, tmp_path / "card.html"), opened, sentinel)


def test_the_artifacts_of_a_hostile_run(tmp_path: Path, opened: Callable[[Path], str], sentinel: Sentinel) -> None:
    for n, text in enumerate(attacks(sentinel.url)):
        report = {"stage": text, "path": text, "content_hash": text, "rows_in": 1, "rows_out": 1, "ran": True}
        report |= {"dropped": {text: 1}, "why": text, "seconds": 1.0}
        move = {"step": text, "reason": text, "rows": 1}
        diff = {"new": {"stage": text}, "rows_same": 1, "rows_changed": 1, "why_out": [move], "why_in": [move]}
        diff |= {"shifts": [{"column": text, "distance": 0.1}], "settings": [text]}
        result = {"pairs": 1, "before": {text: 1.0}, "after": {text: 2.0}}
        pages = [
            stages_page(text, [report]),
            drift_page(text, [diff], text),
            evaluation_page(text, report, report | {"result": result}),
        ]
        assert_harmless(as_html("\n\n".join(pages), tmp_path / f"{n}.html"), opened, sentinel)
