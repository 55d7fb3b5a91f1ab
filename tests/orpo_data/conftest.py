"""What the tests of datasets and their pages share: small dataset folders with pages, and a reader of the pages."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import BaseModel

from orpo_data.branch import Branch
from orpo_data.errors import OrpoError
from orpo_data.manifest import FORMAT_VERSION, Input, Manifest, StepCounts, digest
from orpo_data.report import write_pages
from orpo_data.schema import DROPPED, ORIGIN
from orpo_data.stage import StageReport, run_stage
from orpo_data.steps.step import GlobalStep, Judgement, Step, StepOutput, divide
from orpo_data.writing import DatasetWriter

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


@dataclass(frozen=True)
class TablePart:
    """A table in memory."""

    table: pa.Table
    fingerprint: str = "table"
    split: str | None = None
    size: int = 0

    def read(self, batch_rows: int) -> Iterator[pa.Table]:
        return (self.table.slice(start, batch_rows) for start in range(0, len(self.table), batch_rows))


@pytest.fixture(scope="session")
def table_part() -> type[TablePart]:
    return TablePart


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 rows, shards of 8."""
    monkeypatch.setattr("orpo_data.writing.ROWS_PER_BATCH", 4)
    monkeypatch.setattr("orpo_data.writing.ROWS_PER_SHARD", 8)


# --- a stage over numbers --------------------------------------------------------------------------------------------

NUMBERS = pa.schema([pa.field("id", pa.string()), pa.field("value", pa.int64()), *ORIGIN])
APPLIED: list[tuple[int, str]] = []
"""Place in the chain and id of each row that a step below was applied to."""


class _Toy(BaseModel):
    place: int  # in the chain
    by: int

    def record(self, table: pa.Table) -> None:
        APPLIED.extend((self.place, row) for row in table["id"].to_pylist())

    def divided(self, table: pa.Table, details: list[str | None]) -> StepOutput:
        """Rows with a detail go."""
        reasons = [detail and f"reason_{self.by}" for detail in details]
        return StepOutput(*divide(f"toy-{self.place}", table, *(pa.array(c, pa.string()) for c in (reasons, details))))


class Without(_Toy, Step):
    """Drops multiples of `by`."""

    name: ClassVar[str] = "without"
    version: ClassVar[int] = 1

    def apply(self, table: pa.Table) -> StepOutput:
        self.record(table)
        return self.divided(table, [None if n % self.by else str(n) for n in table["value"].to_pylist()])


class Twice(_Toy, Step):
    """Makes two rows of each multiple of `by`."""

    name: ClassVar[str] = "twice"
    version: ClassVar[int] = 1

    def apply(self, table: pa.Table) -> StepOutput:
        self.record(table)
        rows = table.to_pylist()
        made = [
            row | {"id": row["id"] + suffix, "value": row["value"] + len(suffix)}
            for row in rows
            for suffix in (["a", "bb"] if row["value"] % self.by == 0 else [""])
        ]
        none = self.divided(table.slice(0, 0), []).dropped
        return StepOutput(pa.Table.from_pylist(made, NUMBERS), none, expanded=len(made) - len(rows))


class First(_Toy, GlobalStep):
    """Keeps, of rows with the same value modulo 5 * `by`, the one with the smallest id."""

    name: ClassVar[str] = "first"
    version: ClassVar[int] = 1

    def note(self, table: pa.Table) -> pa.Table:
        return table.select(["id", "value"])

    def judge(self, notes: Sequence[pa.Table]) -> Judgement:
        best: dict[int, str] = {}
        for row in (row for table in notes for row in table.to_pylist()):
            key = row["value"] % (5 * self.by)
            best[key] = min(best.get(key, row["id"]), row["id"])
        verdicts = [
            [None if best[r["value"] % (5 * self.by)] == r["id"] else "later" for r in table.to_pylist()]
            for table in notes
        ]
        facts = {"kept": len(best)}
        return Judgement([pa.table({"detail": pa.array(v, pa.string())}) for v in verdicts], facts)

    def apply(self, table: pa.Table, verdicts: pa.Table) -> StepOutput:
        self.record(table)
        assert len(table) == len(verdicts)
        return self.divided(table, verdicts["detail"].to_pylist())


class Shift(_Toy, GlobalStep):
    """Adds to each value the sum of all values modulo `by`."""

    name: ClassVar[str] = "shift"
    version: ClassVar[int] = 1

    def note(self, table: pa.Table) -> pa.Table:
        return table.select(["value"])

    def judge(self, notes: Sequence[pa.Table]) -> Judgement:
        total = sum(pc.sum(table["value"]).as_py() for table in notes)
        shifted = [[pc.add(chunk, total % self.by) for chunk in table["value"].chunks] for table in notes]
        return Judgement([pa.table({"value": pa.chunked_array(chunks, pa.int64())}) for chunks in shifted])

    def apply(self, table: pa.Table, verdicts: pa.Table) -> StepOutput:
        self.record(table)
        rows, none = len(table), self.divided(table.slice(0, 0), []).dropped
        kept = table.set_column(1, "value", verdicts["value"])
        return StepOutput(kept, none, changed=rows, flagged={"shifted": rows})


@dataclass(frozen=True)
class NumbersPart:
    """Rows with these values; reading them is recorded, and breaks off before the row `breaks`."""

    name: str
    values: tuple[int, ...]
    split: str | None = None
    breaks: int | None = field(default=None, compare=False)
    size: int = 0

    READ: ClassVar[list[str]] = []

    @property
    def fingerprint(self) -> str:
        return digest([self.name, self.values])

    @property
    def rows(self) -> int:
        return len(self.values)

    def read(self, batch_rows: int) -> Iterator[pa.Table]:
        self.READ.append(self.name)
        origin = {"source": "toy", "source_file": self.name}
        rows = [{"id": f"{self.name}{i:03d}", "value": n, "source_row": i} | origin for i, n in enumerate(self.values)]
        for start in range(0, len(rows), batch_rows):
            if self.breaks is not None and start >= self.breaks:
                raise OrpoError(f"{self.name} broke off")
            yield pa.Table.from_pylist(rows[start : start + batch_rows], NUMBERS)


@dataclass(frozen=True)
class Toys:
    """A stage over numbers, and what it asked of parts and steps since the last `forget`."""

    schema = NUMBERS
    part = NumbersPart
    applied = APPLIED
    read = NumbersPart.READ
    kinds: ClassVar[dict[str, type[Any]]] = {"without": Without, "twice": Twice, "first": First, "shift": Shift}

    def forget(self) -> None:
        self.applied.clear()
        self.read.clear()

    def chain(self, kinds: Sequence[tuple[str, int]]) -> list[Any]:
        return [self.kinds[kind](place=place, by=by) for place, (kind, by) in enumerate(kinds)]

    def run(
        self, output: Path, parts: Sequence[Any], steps: Sequence[Any], *, workers: int = 2, **options: Any
    ) -> StageReport:
        """Run them as the stage "toy", without pages; the steps may be given as `chain` takes them."""
        chain = self.chain(steps) if all(isinstance(step, tuple) for step in steps) else steps
        branch = Branch([Input(name=p.name, fingerprint=p.fingerprint) for p in parts], parts, chain, "toy")
        with mock.patch("os.cpu_count", return_value=workers), mock.patch("orpo_data.report.write_pages"):
            return run_stage("toy", output, NUMBERS, [branch], **options)


@pytest.fixture
def toys() -> Toys:
    toys = Toys()
    toys.forget()
    return toys
