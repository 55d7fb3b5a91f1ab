"""The card: valid on the hub, figures as in the manifest, no text of rows, nobody's private places."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from orpo_data.pages.card import fenced, size_category
from orpo_data.pages.upstream import public_place, public_recipe
from orpo_data.schema import PAIRS

HOSTILE = "</b><script>alert(1)</script><img src=x onerror=alert(2)> [a](javascript:alert(3)) `*_| {{ 7*7 }}"


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(head)
    return values


def as_html(card: str) -> str:
    html: str = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])
    return html.replace(' style="text-align:right"', "")


@pytest.fixture
def card(tmp_path, write_dataset):
    """Writes a dataset and reads its card."""

    def make(*args: Any, **values: Any) -> str:
        write_dataset(tmp_path / "d", *args, **values)
        return (tmp_path / "d" / "README.md").read_text()

    return make


def test_figures_are_the_manifests(card, plain_pair, loser):
    rows = {"train": [plain_pair(str(n)) for n in range(1200)], "eval": [plain_pair("e", source="other")] * 34}
    text = card(PAIRS, rows, [loser("tie")] * 5 + [loser("empty_turn")] * 2)
    assert "1,234 rows (train 1,200, eval 34),\nmade from 1,241 rows" in text
    assert "| clean | clean | all | 1,241 | 0 | 0 | 0 | 7 | 1,234 |" in text
    assert "| clean | tie | 5 |\n| clean | empty\\_turn | 2 |" in text
    assert "| hh | 1,200 | 1,200 | 0 |" in text
    assert "ab" * 32 in text
    assert "cd" * 32 in text


def test_the_hub_reads_the_front_matter(card, plain_pair):
    text = card(PAIRS, {"train": [plain_pair()] * 3, "eval": [plain_pair()]}, name="x: '---\n")
    assert DatasetCard(text).data.to_dict() == {
        "pretty_name": "x: '---\n: clean",
        "license": "other",
        "task_categories": ["text-generation"],
        "size_categories": ["n<1K"],
        "tags": ["preference", "orpo", "dpo", "rlhf"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": "train", "path": "train/data-*.arrow"},
                    {"split": "eval", "path": "eval/data-*.arrow"},
                ],
            }
        ],
    }


def test_front_matter_opens_the_splits(card, plain_pair, tmp_path):
    card(PAIRS, {"train": [plain_pair()] * 3, "eval": [plain_pair()]})
    opened = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in opened.items()} == {"train": 3, "eval": 1}


def test_front_matter_before_the_split(card, plain_pair):
    values = front_matter(card(PAIRS, {None: [plain_pair()] * 1000}))
    assert values["size_categories"] == ["1K<n<10K"]
    assert values["configs"][0]["data_files"] == [{"split": "train", "path": "data-*.arrow"}]


SOURCES = {
    "hh": {"dataset": "hh-rlhf", "path": "Anthropic/hh-rlhf", "name": "hh", "revision": "abc123"},
    "uf": {"dataset": "ultrafeedback", "path": "/home/someone/UltraFeedback", "name": "uf"},
    "own": {"dataset": "pairs", "path": "s3://key:secret@bucket/pairs.jsonl?sig=secret", "name": "own"},
}


@pytest.mark.parametrize(
    ("labels", "licence", "language"),
    [
        (["hh"], "mit", ["en"]),
        (["hh", "uf"], "mit", ["en"]),
        (["own"], "other", None),
        (["hh", "own"], ["mit", "other"], None),
    ],
)
def test_licences_and_languages_are_those_of_the_sources_that_have_rows(card, plain_pair, labels, licence, language):
    recipe = {"sources": list(SOURCES.values())}
    values = front_matter(card(PAIRS, {None: [plain_pair(source=label) for label in labels]}, recipe=recipe))
    assert values["license"] == licence
    assert values.get("language") == language


def test_sources_with_their_licence_and_no_private_place(card, plain_pair):
    recipe = {"sources": list(SOURCES.values()), "tokenize": {"tokenizer": "/home/someone/model"}, "train": {"x": 1}}
    text = card(PAIRS, {None: [plain_pair(source=label) for label in SOURCES]}, recipe=recipe)
    assert "| hh | 1 | Anthropic/hh-rlhf | abc123 | MIT |" in text
    assert "| uf | 1 | UltraFeedback | none given | MIT |" in text
    assert "| own | 1 | s3://bucket/pairs.jsonl | none given | not stated |" in text
    for private in ("secret", "someone", "train:"):
        assert private not in text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("openbmb/UltraFeedback", "openbmb/UltraFeedback"),
        ("data.jsonl", "data.jsonl"),
        ("/home/me/data/", "data"),
        ("./data/x.jsonl", "x.jsonl"),
        ("~/data/*.jsonl", "*.jsonl"),
        ("C:\\Users\\me\\x.jsonl", "x.jsonl"),
        ("a/b/c/d.jsonl", "d.jsonl"),
        ("https://me:pw@host:8080/x/y.jsonl?token=t#f", "https://host:8080/x/y.jsonl"),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_places_that_others_may_read(path, shown):
    assert public_place(path) == shown


def test_the_recipe_in_the_card_is_what_the_rows_depend_on():
    recipe = {"name": "x", "sources": [{"path": "/a/b"}], "train": {"model": "/m"}, "evaluate": {}, "clean": {}}
    assert public_recipe(recipe) == {"name": "x", "sources": [{"path": "b"}], "clean": {}}
    assert recipe["sources"] == [{"path": "/a/b"}]


def test_no_place_in_a_recipe_tells_of_ones_own_machine():
    recipe = {
        "decontaminate": {"against": ["mt_bench", {"name": "mine", "path": "https://me:pw@host/q.jsonl?token=t"}]},
        "tokenize": {"tokenizer": "/home/me/tokenizer", "chat_template": "/home/me/own.jinja", "max_length": 9},
    }
    assert public_recipe(recipe) == {
        "decontaminate": {"against": ["mt_bench", {"name": "mine", "path": "https://host/q.jsonl"}]},
        "tokenize": {"tokenizer": "tokenizer", "chat_template": "own.jinja", "max_length": 9},
    }
    assert public_recipe({"tokenize": {"tokenizer": "me/tok", "chat_template": "chatml"}}) == {
        "tokenize": {"tokenizer": "me/tok", "chat_template": "chatml"}
    }


def test_names_stay_in_their_cell(card, plain_pair):
    html = as_html(card(PAIRS, {None: [plain_pair()]}, name="a\n# b", source="x|y\n| z |"))
    assert "<td>x|y | z |</td>" in html
    assert "<h1>a # b: clean</h1>" in html


def test_text_from_data_and_recipe_stays_text(card, plain_pair, loser, read_page):
    recipe = {"clean": {HOSTILE: "```\n<script>alert(1)</script>\n````\n" + HOSTILE}, "sources": []}
    losers = [loser(HOSTILE, HOSTILE)]
    text = card(PAIRS, {None: [plain_pair(source=HOSTILE)]}, losers, name=HOSTILE, source=HOSTILE, recipe=recipe)
    page = read_page(as_html(text).replace('href="report.html"', ""))
    page.assert_harmless()
    assert "script" not in page.tags
    assert HOSTILE in page.text


@given(st.text(alphabet="`~ab \n", max_size=60))
@example("```")
@example("a\n  ````\n```")
def test_no_text_closes_its_fence(text):
    body = text + "\n"
    tokens = MarkdownIt("commonmark").parse(fenced(body, "yaml") + "after\n")
    assert [token.type for token in tokens][:2] == ["fence", "paragraph_open"]
    assert tokens[0].content == body


def test_no_text_of_messages(card, plain_pair, loser):
    text = card(PAIRS, {None: [plain_pair("SECRET PROMPT")]}, [loser("tie", "SECRET ROW", "SECRET DETAIL")])
    assert "SECRET" not in text


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        *((0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (60_917, "10K<n<100K"), (10**6, "1M<n<10M")),
        *((10**9 - 1, "100M<n<1B"), (10**12 - 1, "100B<n<1T"), (10**12, "n>1T")),
    ],
)
def test_sizes_as_the_hub_calls_them(rows, name):
    assert size_category(rows) == name


def test_the_card_of_a_whole_run_tells_every_step(prepared: Path):
    text = (prepared / "split" / "README.md").read_text()
    for row in ("| ingest | parse | hh-rlhf |", "| binarize | binarize | ultrafeedback |", "| clean | clean | all |"):
        assert row in text
    assert "raw records" in text
    assert "- **Not looked for**: " in text
    assert "license: mit" in text
