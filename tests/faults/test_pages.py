"""Pages: hostile text does nothing in reports, cards and Prefect's artifacts: in a real browser, links read too."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from flows.artifacts import drift_page, evaluation_page, stages_page
from pipelines import prepare
from pipelines.evaluation import evaluate_model
from pipelines.recipe import EvaluateConfig, Recipe
from pipelines.training import train_model


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


def assert_harmless(page: Path, dom: Callable[..., str], sentinel: Any) -> None:
    document = dom(f"file://{page}")
    title = re.search("<title>(.*?)</title>", document, re.S)
    assert title
    assert title[1].strip() != "owned"
    links = re.findall(r'(?:href|src|action)\s*=\s*"([^"]*)"', document)
    assert not [link for link in links if re.match(r"\s*(javascript|vbscript|data:text/html)", link, re.I)], page
    assert sentinel.asked == [], page


@pytest.mark.slow
def test_the_pages_of_a_hostile_dataset(
    make_recipe: Callable[..., Recipe],
    tiny_training: Callable[..., Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    dom: Callable[..., str],
    sentinel: Any,
) -> None:
    """Reports and cards of each stage, of the model and its evaluation: rows, files, recipe and model are hostile."""
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
    recipe = make_recipe(*overrides, "tokenize.max_length=400", "tokenize.max_prompt_length=300")
    prepare(recipe, tmp_path / "run")
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "<script>document.title='owned'<" / "script>"))
    dataset, settings = tmp_path / "run/tokenize", tiny_training(model=str(model), max_steps=2)
    trained = train_model(dataset, settings, tmp_path / "run/model", job=recipe.name).path
    judged = evaluate_model(trained, dataset, tmp_path / "run/evaluate", EvaluateConfig(max_new_tokens=4))
    assert any("document.title" in sample["prompt"] for sample in judged.result["samples"])
    reports = sorted((tmp_path / "run").rglob("report.html"))
    assert [report.parent.name for report in reports if report.parent.parent == tmp_path / "run"] == [
        *("binarize", "clean", "evaluate", "split", "tokenize")
    ]
    for report in reports:
        assert_harmless(report, dom, sentinel)
    cards = sorted((tmp_path / "run").rglob("README.md"))
    assert trained / "README.md" in cards
    assert len(cards) == len(reports)  # the evaluation has none, the model no report
    for card in cards:
        assert_harmless(as_html(card.read_text(), tmp_path / "card.html"), dom, sentinel)


def test_the_artifacts_of_a_hostile_run(tmp_path: Path, dom: Callable[..., str], sentinel: Any) -> None:
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
        assert_harmless(as_html("\n\n".join(pages), tmp_path / f"{n}.html"), dom, sentinel)
