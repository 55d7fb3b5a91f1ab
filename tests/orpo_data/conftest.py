"""What the tests of datasets and their pages share: small dataset folders with pages, and a reader of the pages."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from orpo_data.manifest import FORMAT_VERSION, Input, Manifest, StepCounts
from orpo_data.report import write_pages
from orpo_data.schema import DROPPED
from orpo_data.shards import DatasetWriter

OWN_LINKS = re.compile(r"#[a-z]+|(\.\./)+[\w%./-]+/report\.html")
RUNS_OR_LOADS = {"img", "link", "iframe", "object", "embed", "form", "base", "image", "use", "video", "audio", "frame"}
LOADING = {"src", "xlink:href", "action", "formaction", "srcset", "data", "background", "poster", "ping", "style"}


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.pieces: list[str] = []
        self.feed(re.sub("<(style|script)>.*?</(style|script)>", "", html, flags=re.DOTALL))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def words(self) -> str:
        """What a reader reads, element after element, one space between words."""
        return " ".join(" ".join(self.pieces).split())

    def assert_harmless(self) -> None:
        """No element that runs or loads anything, no attribute that does, no link out: data is text and no more."""
        assert not set(self.tags) & RUNS_OR_LOADS
        assert not {name for name in self.attributes if name.startswith("on")}
        assert not self.attributes & LOADING
        assert [link for link in self.links if not OWN_LINKS.fullmatch(link)] == []


@pytest.fixture(scope="session")
def read_page() -> Callable[[str], Page]:
    return Page


def _write_dataset(
    folder: Path,
    schema: pa.Schema,
    rows: dict[str | None, list[dict[str, Any]]],
    losers: list[dict[str, Any]] | None = None,
    *,
    name: str = "trial",
    source: str | None = None,
    stage: str = "clean",
    inputs: list[Input] | None = None,
    recipe: dict[str, Any] | None = None,
    **counts: Any,
) -> Manifest:
    """A dataset folder of `rows` by split, `losers` dropped by one step, with its pages."""
    losers = losers or []
    kept = sum(map(len, rows.values()))
    reasons = [loser["reason"] for loser in losers]
    counted = {
        "rows_in": kept + len(losers),
        "rows_out": kept,
        "dropped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
    }
    with DatasetWriter(folder, schema) as writer:
        writer.declare_splits([split for split in rows if split])
        for split, part in rows.items():
            writer.write(pa.Table.from_pylist(part, schema=schema), split)
        writer.write_dropped(pa.Table.from_pylist(losers, schema=DROPPED))
        shards, aside = writer.close()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            stage=stage,
            fingerprint="ab" * 32,
            content_hash="cd" * 32,
            key={},
            inputs=inputs or [Input(name=source or "raw.jsonl", fingerprint="ef" * 32, revision=source)],
            rows_in=kept + len(losers),
            steps=[StepCounts(step="clean", version=1, source=source, config={"ties": source}, **counted | counts)],
            shards=shards,
            dropped=aside,
            files={},
            recipe={"name": name} | (recipe or {}),
            seed=None,
            versions={},
            git_commit=None,
        )
        write_pages(writer.folder, manifest)
        writer.commit(manifest)
    return manifest


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Manifest]:
    return _write_dataset


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _pair(text: str = "hello", answers: tuple[str, str] = ("good", "bad"), **values: Any) -> dict[str, Any]:
    """A PAIRS or JUDGED row of one turn, with the id that `values` or nobody gave it."""
    sides = {side: _message("assistant", answer) for side, answer in zip(("chosen", "rejected"), answers, strict=True)}
    origin = {"source": "hh", "source_file": "a.jsonl", "source_row": 3}
    return {"id": "0" * 32, "prompt": _message("user", text), **sides, **origin, **values}


@pytest.fixture(scope="session")
def plain_pair() -> Callable[..., dict[str, Any]]:
    return _pair


def _loser(reason: str, row: str = "{}", detail: str | None = "detail", **values: Any) -> dict[str, Any]:
    """A DROPPED row."""
    origin = {"source": "hh", "source_file": "a.jsonl", "source_row": 3}
    return {"id": None, "step": "clean", "reason": reason, "detail": detail, **origin, "row": row, **values}


@pytest.fixture(scope="session")
def loser() -> Callable[..., dict[str, Any]]:
    return _loser
