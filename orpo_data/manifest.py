"""The manifest of a dataset folder: what it holds, what it was made of, and by which steps."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from orpo_data.errors import OrpoError

MANIFEST_NAME = "_manifest.json"
FORMAT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _below(path: str) -> str:
    """A manifest may have come from anywhere: what it names lies in its own folder."""
    if path.startswith("/") or ".." in path.split("/") or "\\" in path or "\0" in path or not path:
        raise ValueError(f"{path!r} does not lie in the folder")
    return path


Below = Annotated[str, AfterValidator(_below)]
"""The path of a file in a folder, as seen from there."""


class Shard(_Record):
    """One Arrow stream file, or one file of a model's weights (no rows then).

    `tokens` counts both sides of every pair and is null before tokenization.
    """

    path: Below
    split: str | None
    rows: int
    tokens: int | None
    bytes: int
    sha256: str


class Input(_Record):
    """One thing a stage read: another dataset folder (`path` relative to this one) or a raw file."""

    name: str
    path: str | None = None
    stage: str | None = None
    fingerprint: str
    content_hash: str | None = None
    revision: str | None = None


class Tally(_Record):
    """What a step did with rows: rows_in + expanded == rows_out + sum(dropped.values())."""

    rows_in: int = 0
    expanded: int = 0
    rows_out: int = 0
    changed: int = 0
    dropped: dict[str, int] = {}
    flagged: dict[str, int] = {}  # rows by the name of a rule that flagged them; a row may have several flags

    def check(self, step: str) -> None:
        """Raise if a row is unaccounted for: that is a defect of the step, never of the data."""
        if self.rows_in + self.expanded != self.rows_out + sum(self.dropped.values()):
            raise AssertionError(f"step {step} lost rows: {self.model_dump()}")

    def __add__(self, other: "Tally") -> "Tally":
        rows = ("rows_in", "expanded", "rows_out", "changed")
        sums = {name: getattr(self, name) + getattr(other, name) for name in rows}
        named = {name: Counter(getattr(self, name)) + Counter(getattr(other, name)) for name in ("dropped", "flagged")}
        return Tally(**sums, **{name: dict(sorted(counts.items())) for name, counts in named.items()})


class StepCounts(Tally):
    """A step as it was run, and what it did."""

    step: str
    version: int
    source: str | None
    config: dict[str, Any]
    facts: dict[str, Any] = {}  # what else the step found, e.g. the clusters of near-duplicates


class PartRecord(_Record):
    """What one part of a stage's input came to, so that the next run can take it over."""

    key: str  # hash of everything its rows depend on
    rows_in: int
    steps: list[Tally]
    shards: list[str]  # paths, in order
    dropped: int  # its rows in dropped/, where parts stand in the same order


class Manifest(_Record):
    """Written last: its presence says the folder is complete."""

    format_version: int
    stage: str
    fingerprint: str  # hash of `key`
    content_hash: str  # hash of the shards
    key: dict[str, Any]  # everything the rows depend on
    inputs: list[Input]
    rows_in: int  # rows read from the inputs, before any step
    steps: list[StepCounts]
    shards: list[Shard]
    dropped: list[Shard]
    files: dict[Below, str]  # sha256 of every other file in the folder
    recipe: dict[str, Any]
    seed: int | None
    versions: dict[str, str]
    git_commit: str | None

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def drop_reasons(self) -> dict[str, int]:
        """Dropped rows by reason over all steps, most frequent first."""
        totals: dict[str, int] = {}
        for step in self.steps:
            for reason, count in step.dropped.items():
                totals[reason] = totals.get(reason, 0) + count
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in order; empty before the split stage."""
        return list(dict.fromkeys(shard.split for shard in self.shards if shard.split is not None))


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_NAME).write_text(manifest_text(manifest), "utf-8")


def manifest_text(manifest: Manifest) -> str:
    """The manifest with a checksum of what it says."""
    document = manifest.model_dump(mode="json")
    document["checksum"] = digest(document)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a dataset folder; OrpoError if there is none or it was altered."""
    file = folder / MANIFEST_NAME
    try:
        document = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        raise OrpoError(f"{folder}: not a dataset folder (it has no {MANIFEST_NAME})") from None
    except (orjson.JSONDecodeError, OSError) as error:
        raise OrpoError(f"{file}: unreadable manifest ({error})") from None
    if not isinstance(document, dict) or document.pop("checksum", None) != digest(document):
        raise OrpoError(f"{file}: the manifest was altered after it was written (its checksum does not match)")
    if document.get("format_version") != FORMAT_VERSION:
        raise OrpoError(f"{file}: format version {document.get('format_version')}, this version reads {FORMAT_VERSION}")
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise OrpoError(f"{file}: malformed manifest: {error.errors()[0]['msg']}") from None
