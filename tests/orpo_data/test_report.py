"""Pages for people: figures as in the manifest, nothing from data escapes, the same bytes every time."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from orpo_data.manifest import FORMAT_VERSION, Input, Manifest, StepCounts
from orpo_data.report import evaluation_page, write_pages
from orpo_data.report_page import length_histogram, margin_histogram, markdown, shorten
from orpo_data.schema import DROPPED, PAIRS, RATED, TOKENIZED
from orpo_data.shards import DatasetWriter

HOSTILE = (
    "</b><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='x' [a](javascript:alert(3)) `*_| {{ 7*7 }}"
)
ORIGIN = {"source": HOSTILE, "source_file": HOSTILE, "source_row": 3}
PLAIN = {"source": "hh", "source_file": "a.jsonl", "source_row": 3}


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.pieces: list[str] = []
        self.feed(re.sub("<style>.*?</style>", "", html, flags=re.DOTALL))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def words(html: str) -> str:
    """What a reader reads, element after element, one space between words."""
    return " ".join(" ".join(Page(html).pieces).split())


def assert_harmless(html: str) -> None:
    """No element that runs or loads anything, no attribute that does: whatever the data held is text."""
    page = Page(html)
    assert not page.tags & {"script", "img", "a", "link", "iframe", "object", "embed", "form", "base", "image", "use"}
    assert not {name for name in page.attributes if name.startswith("on")}
    assert not page.attributes & {"src", "href", "xlink:href", "action", "srcset", "data", "background"}
    assert "<script" not in html.lower()
    assert "url(" not in html.split("</style>")[0]
    assert "@import" not in html.split("</style>")[0]


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def pair(text: str = "hello", answers: tuple[str, str] = ("good", "bad"), **values: Any) -> dict[str, Any]:
    chosen, rejected = answers
    sides = {"chosen": message("assistant", chosen), "rejected": message("assistant", rejected)}
    return {"id": "0" * 32, "prompt": message("user", text), **sides, **PLAIN, **values}


def hostile_pair() -> dict[str, Any]:
    texts = {name: HOSTILE for name in PAIRS.names if PAIRS.field(name).type == pa.string()}
    messages = {name: message(HOSTILE, HOSTILE) for name in ("prompt", "chosen", "rejected")}
    return {**texts, **messages, "score_chosen": 4.25, "source_row": 3}


def rated(text: str) -> dict[str, Any]:
    answer = {"model": text, "response": text, "system_prompt": text, "overall_score": 7.5, "honesty": None}
    origin = {"source": text, "source_file": text, "source_row": 1}
    return {"id": text, "prompt": message(text, text), "completions": [answer] * 3, "subset": text, **origin}


def tokenized(prompt: int, chosen: int, rejected: int, source: str = "hh") -> dict[str, Any]:
    lengths = {"chosen_input_ids": prompt + chosen, "rejected_input_ids": prompt + rejected}
    ids = {name: list(range(length)) for name, length in lengths.items()}
    flags = {"prompt_turns_dropped": 0, "chosen_truncated": True, "rejected_truncated": False}
    return {"id": "f" * 32, **ids, "prompt_len": prompt, "source": source, **flags}


def dropped(reason: str, row: str, text: str = "detail") -> dict[str, Any]:
    return {"id": None, "step": "clean", "reason": reason, "detail": text, "row": row, **PLAIN}


def write(
    folder: Path,
    schema: pa.Schema,
    rows: dict[str | None, list[dict[str, Any]]],
    losers: list[dict[str, Any]] | None = None,
    name: str = "trial",
    source: str | None = None,
) -> tuple[str, str, Manifest]:
    """A dataset folder of `rows` by split, `losers` dropped by one step: README.md, report.html, manifest."""
    losers = losers or []
    kept = sum(map(len, rows.values()))
    reasons = [loser["reason"] for loser in losers]
    counts = {
        "rows_in": kept + len(losers),
        "rows_out": kept,
        "dropped": {r: reasons.count(r) for r in sorted(set(reasons))},
    }
    with DatasetWriter(folder, schema) as writer:
        writer.declare_splits([split for split in rows if split])
        for split, part in rows.items():
            writer.write(pa.Table.from_pylist(part, schema=schema), split)
        writer.write_dropped(pa.Table.from_pylist(losers, schema=DROPPED))
        shards, aside = writer.close()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            stage="clean",
            fingerprint="ab" * 32,
            content_hash="cd" * 32,
            key={},
            inputs=[Input(name=source or "raw.jsonl", fingerprint="ef" * 32, revision=source)],
            rows_in=kept + len(losers),
            steps=[StepCounts(step="clean", version=1, source=source, config={"ties": source}, **counts)],
            shards=shards,
            dropped=aside,
            files={},
            recipe={"name": name},
            seed=None,
            versions={},
            git_commit=None,
        )
        write_pages(writer.folder, manifest)
        writer.commit(manifest)
    return (folder / "README.md").read_text(), (folder / "report.html").read_text(), manifest


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(head)
    return values


@pytest.mark.parametrize(
    ("schema", "row"),
    [(PAIRS, hostile_pair()), (RATED, rated(HOSTILE)), (TOKENIZED, {**tokenized(3, 4, 5, HOSTILE), "id": HOSTILE})],
    ids=["pairs", "rated", "tokenized"],
)
def test_text_from_data_stays_text(tmp_path, schema, row):
    losers = [
        {**dropped("tie", HOSTILE, HOSTILE), **ORIGIN},
        {**dropped("empty_turn", pa.scalar(HOSTILE).as_py()), **ORIGIN},
    ]
    card, report, _ = write(tmp_path / "d", schema, {None: [row]}, losers, name=HOSTILE, source=HOSTILE)
    assert_harmless(report)
    assert HOSTILE in Page(report).text
    assert "49" not in Page(report).text.replace("{{ 7*7 }}", "")  # data is no template
    body = card.split("---\n", 2)[2]
    assert_harmless(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))


def test_names_stay_in_their_cell_of_the_card(tmp_path):
    card, _, _ = write(tmp_path / "d", PAIRS, {None: [pair()]}, name="a\n# b", source="x|y\n| z |")
    html = MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])
    assert "<td>x|y | z |</td>" in html
    assert "<h1>a # b: clean</h1>" in html


def test_no_text_of_messages_in_the_card(tmp_path):
    card, _, _ = write(tmp_path / "d", PAIRS, {None: [pair("SECRET PROMPT")]}, [dropped("tie", "SECRET ROW")])
    assert "SECRET" not in card


@given(st.text())
def test_markdown_renders_as_the_text_itself(text):
    html = MarkdownIt("commonmark", {"html": True}).enable("table").renderInline(str(markdown(f"x{text}")))
    page = Page(html)
    assert not page.tags
    assert page.text == " ".join(f"x{text}".replace("\0", "\ufffd").split())


def test_figures_are_the_manifests(tmp_path):
    rows = {"train": [pair(str(n)) for n in range(1200)], "eval": [pair("e", source="other")] * 34}
    losers = [dropped("tie", "{}")] * 5 + [dropped("empty_turn", "{}")] * 2
    card, report, manifest = write(tmp_path / "d", PAIRS, rows, losers)
    text = words(report)
    assert "Rows 1,234 Rows read 1,241 Dropped 7" in text
    assert "read 1,241 clean" in text
    assert "5 tie 2 empty_turn" in text  # the most frequent first
    assert "hh 1,200 0 1,200 other 0 34 34" in text
    assert manifest.fingerprint in text
    assert manifest.content_hash in text
    assert "1,234 rows (train 1,200, eval 34),\nmade from 1,241 rows" in card
    assert "| clean | all | 1,241 | 0 | 0 | 7 | 1,234 |" in card
    assert "| tie | 5 |\n| empty\\_turn | 2 |" in card
    assert manifest.fingerprint in card
    assert manifest.content_hash in card


def test_bars_share_one_scale(tmp_path):
    _, report, _ = write(tmp_path / "d", PAIRS, {None: [pair()] * 6}, [dropped("tie", "{}")] * 2)
    assert re.findall(r'class="(\w+)" style="width:([\d.]+)%', report) == [
        ("kept", "100.00"),
        ("lost", "0.00"),
        ("kept", "75.00"),
        ("lost", "25.00"),
    ]


def test_same_data_same_bytes(tmp_path):
    rows = {"train": [pair(f"{n} " * n) for n in range(1, 30)], "eval": []}
    pages = [write(tmp_path / name, PAIRS, rows, [dropped("tie", "{}")])[:2] for name in ("one", "two")]
    assert pages[0] == pages[1]
    assert str(tmp_path) not in "".join(pages[0])


def test_lengths_in_characters(tmp_path):
    rows = [pair("ab", ("é" * 10, "x")), pair("abcd", ("é" * 20, "xyz"))]
    rows[1]["prompt"] += message("assistant", "efgh")
    _, report, _ = write(tmp_path / "d", PAIRS, {None: rows})
    text = words(report)
    assert "prompt 5 8 8" in text  # of 2 and 8: median, 95 %, maximum
    assert "chosen 15 20 20 rejected 2 3 3" in text


def test_lengths_in_tokens_are_of_the_answer_alone(tmp_path):
    _, report, _ = write(tmp_path / "d", TOKENIZED, {"train": [tokenized(100, 7, 1009)], "eval": []})
    text = words(report)
    assert "chosen 7 7 7 rejected 1,009 1,009 1,009" in text
    assert "hh 100 7 1,009 0 chosen" in text  # the sample row, its chosen side truncated
    assert "Tokens 1,216" in text


def test_rated_answers_with_their_ratings(tmp_path):
    _, report, _ = write(tmp_path / "d", RATED, {None: [rated("ab")]})
    text = words(report)
    assert "ab · overall score 7.5 assistant ab" in text
    assert "honesty" not in text


def test_an_empty_eval_split_and_nothing_dropped(tmp_path):
    card, report, _ = write(tmp_path / "d", PAIRS, {"train": [pair()], "eval": []})
    assert "No row was dropped." in card
    assert "Dropped rows" not in report
    assert "eval 0" in card


def test_two_dropped_rows_a_reason_with_their_origin(tmp_path):
    losers = [dropped("tie", f'{{"prompt": [{{"role": "user", "content": "lost {n}"}}]}}') for n in range(4)]
    losers += [dropped("unparsable", '{"chosen": "broken', "line 4")]
    _, report, _ = write(tmp_path / "d", PAIRS, {None: [pair()]}, losers)
    text = words(report)
    assert text.count("user: lost") == 2
    assert "user: lost 1" in text
    assert 'hh, a.jsonl, record 3 · step clean · line 4 record {"chosen": "broken' in text


def test_front_matter_opens_the_splits_on_the_hub(tmp_path):
    folder = tmp_path / "d"
    card, _, _ = write(folder, PAIRS, {"train": [pair()] * 3, "eval": [pair()]}, name="x: '---\n")
    values = front_matter(card)
    assert values["size_categories"] == ["n<1K"]
    opened = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in opened.items()} == {"train": 3, "eval": 1}


def test_front_matter_before_the_split(tmp_path):
    card, _, _ = write(tmp_path / "d", PAIRS, {None: [pair()] * 1000})
    values = front_matter(card)
    assert values["size_categories"] == ["1K<n<10K"]
    assert values["configs"][0]["data_files"] == [{"split": "train", "path": "data-*.arrow"}]


def areas(path: str) -> float:
    """Area under a staircase `M x,base V y H x ... V base Z`, by hand."""
    x, total = float(re.match(r"M([-\d.]+)", path)[1]), 0.0
    for y, right in re.findall(r"V([\d.]+)H([\d.]+)", path):
        total += (130 - float(y)) * (float(right) - x)
        x = float(right)
    return total


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_every_length_is_inside_the_chart(lengths):
    chart = length_histogram({"prompt": np.array(lengths)})
    assert 1 <= chart.peak <= len(lengths)
    assert chart.ticks
    assert all(0 <= x <= 520 for x, _ in chart.ticks)
    assert chart.summary["prompt"]["max"] == max(lengths)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.lists(st.floats(-1e6, 1e6)))
@example([0.0], [])
@example([0.0, 5e-324], [])
@example([1e6, 1e6 + 1e-9], [])
def test_every_margin_is_inside_the_chart(before, after):
    chart = margin_histogram({"before": before, "after": after})
    assert chart.areas["before"].count("H") <= 42
    assert areas(chart.areas["before"]) > 0
    assert 1 <= chart.peak <= len(before) + len(after)


def test_margins_of_a_hand_worked_chart():
    chart = margin_histogram({"after": [-1.0, 1.0, 1.0, float("nan"), None, float("inf")]})
    assert chart.peak == 2
    assert chart.left_out == 3
    assert chart.zero == pytest.approx(1.0 / 2.05 * 520)  # bins of 0.05 from -1 to 1.05, so zero is 20 bins in
    assert {"-1", "0", "1"} <= {label for _, label in chart.ticks}


def test_no_values_no_chart():
    assert length_histogram({"prompt": np.array([], dtype=int)}) is None
    assert margin_histogram({"after": [float("nan")]}) is None


def test_shorten_keeps_both_ends():
    assert shorten("a" * 10, 10) == "a" * 10
    assert shorten("a" * 500 + "z" * 500, 10) == "aaaaa … (990 characters left out) … zzzzz"


def evaluation(before: bool = True, text: str = "text") -> dict[str, Any]:
    metrics = {"log_odds_ratio": 0.5, "pair_accuracy": 0.75, "nll": 2.0, "logps_rejected": -3.0, text: 1.0}
    earlier = {"log_odds_ratio": 0.25, "pair_accuracy": 0.5, "nll": 1.5, "logps_rejected": -3.0, text: 2.0}
    return {
        "model": text,
        "base_model": text if before else None,
        "dataset": text,
        "pairs": 1234,
        "before": earlier if before else None,
        "after": metrics,
        "per_pair": {"before_margin": [-1.0, 1.0, -1.0] if before else None, "after_margin": [1.0, 1.0, 2.0]},
        "samples": [{"prompt": text, "chosen": text, "before": text if before else None, "after": text}],
    }


def test_evaluation_says_what_became_better():
    text = words(evaluation_page(evaluation()))
    assert "Pairs 1,234 Pair accuracy 75.0 % Log odds ratio 0.5000 Newly right 2 Newly wrong 0" in text
    assert re.search(r"Log odds ratio [^✓✗]* 0.2500 0.5000 \+0.2500 ✓ better", text)
    assert re.search(r"Pair accuracy [^✓✗]* 50.0 % 75.0 % \+25.0 points ✓ better", text)
    assert re.search(r"NLL [^✓✗]* 1.5000 2.0000 \+0.5000 ✗ worse", text)
    assert re.search(r"-3.0000 -3.0000 \+0.0000 text 2.0000 1.0000 -1.0000 How", text)  # no change, no known direction


def test_evaluation_without_a_before():
    text = words(evaluation_page(evaluation(before=False)))
    assert "before" not in text.lower()
    assert "NLL negative log-likelihood of the chosen answer 2.0000" in text


def test_evaluation_is_harmless_and_reproducible():
    page = evaluation_page(evaluation(text=HOSTILE))
    assert_harmless(page)
    assert HOSTILE in Page(page).text
    assert page == evaluation_page(evaluation(text=HOSTILE))


def test_evaluation_without_samples_or_finite_margins():
    result = {**evaluation(before=False), "samples": []}
    result["per_pair"]["after_margin"] = [None]
    page = evaluation_page(result)
    assert "<svg" not in page
    assert "Sample answers" not in page
