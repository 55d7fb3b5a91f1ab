"""Every kind of damage is noticed, and the file that has it is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import orpo_data
from orpo_data.errors import OrpoError
from orpo_data.folders import refuse_foreign_files
from orpo_data.manifest import MANIFEST_NAME, digest, read_manifest

STAGES = ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"]


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A split dataset of one's own."""
    shutil.copytree(prepared / "split", tmp_path / "split")
    return tmp_path / "split"


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def names(folder: Path) -> set[str]:
    """The files that verify complains about."""
    report = orpo_data.verify(folder)
    assert report.ok == (not report.problems)
    assert all("\n" not in line for line in report.problems)
    return {
        name
        for name in [*files_of(folder), *FILES]
        for line in report.problems
        if line.startswith(f"{folder / name}: ")
    }


FILES = [
    *("README.md", "_lineage.ndjson", "_manifest.json", "_parts.json", "report.html", "dataset_dict.json"),
    *(f"{side}/data-0000{i}-of-00002.arrow" for side in ("train", "eval") for i in range(2)),
    "dropped/data-00000-of-00001.arrow",
    *(f"{part}/{name}" for part in ("train", "eval", "dropped") for name in ("state.json", "dataset_info.json")),
]


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_written_is_sound(prepared: Path, stage: str) -> None:
    report = orpo_data.verify(prepared / stage)
    assert report.ok
    assert report.rows == read_manifest(prepared / stage).rows
    assert report.files == len(files_of(prepared / stage)) - 1  # all but the manifest itself


@given(st.sampled_from(FILES), st.integers(0), st.integers(1, 255))
def test_any_changed_byte(folder: Path, name: str, offset: int, change: int) -> None:
    file = folder / name
    before = file.read_bytes()
    offset %= len(before)
    file.write_bytes(before[:offset] + bytes([before[offset] ^ change]) + before[offset + 1 :])
    try:
        assert names(folder) == {name}
    finally:
        file.write_bytes(before)


@given(st.sampled_from(FILES), st.integers(0))
def test_any_truncation(folder: Path, name: str, length: int) -> None:
    file = folder / name
    before = file.read_bytes()
    file.write_bytes(before[: length % len(before)])
    try:
        assert names(folder) == {name}
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    report = orpo_data.verify(folder)
    assert not report.ok
    assert all(name in line for line in report.problems)


@pytest.mark.parametrize("name", ["notes.txt", "train/data-00001-of-00001.arrow", "more/data.arrow", ".hidden"])
def test_a_file_too_many(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    assert orpo_data.verify(folder).problems == (f"{folder / name}: not in the manifest",)


def test_the_caches_of_datasets_are_passed_over(folder: Path) -> None:
    """`map` on a memory-mapped dataset writes its cache beside the shards; the folder is sound all the same."""
    rows = orpo_data.load(folder, read_manifest(folder).splits[0] if read_manifest(folder).splits else "train")
    rows.map(lambda row: {"length": len(row["id"])})
    assert list(folder.rglob("cache-*.arrow"))
    assert orpo_data.verify(folder).ok
    refuse_foreign_files(folder)


def test_two_shards_swapped(folder: Path) -> None:
    a, b = (folder / part / "data-00000-of-00002.arrow" for part in ("train", "eval"))
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    assert names(folder) == {"train/data-00000-of-00002.arrow", "eval/data-00000-of-00002.arrow"}


def test_a_folder_in_a_files_place(folder: Path) -> None:
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    assert orpo_data.verify(folder).problems == (f"{folder / 'report.html'}: missing",)


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "rows": lambda document: document["shards"][0].update(rows=1),
    "recipe": lambda document: document["recipe"].update(name="another"),
    "counts": lambda document: document["steps"][0].update(rows_in=0),
    "a key left out": lambda document: document.pop("seed"),
    "its checksum left out": lambda document: document.pop("checksum"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest(folder: Path, edit: str) -> None:
    file = folder / MANIFEST_NAME
    document = json.loads(file.read_text())
    EDITS[edit](document)
    file.write_text(json.dumps(document))
    (problem,) = orpo_data.verify(folder).problems
    assert problem == f"{file}: the manifest was altered after it was written (its checksum does not match)"
    with pytest.raises(OrpoError, match="altered"):
        orpo_data.load(folder)


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "the key": (lambda document: document["key"].update(stage="clean"), "the fingerprint does not follow from the key"),
    "the hash": (
        lambda document: document.update(content_hash="0" * 64),
        "the content hash does not follow from the shards",
    ),
    "the rows": (lambda document: document["shards"][0].update(rows=1), "rows, the manifest says 1"),
    "a newer format": (lambda document: document.update(format_version=99), "format version 99, this version reads 1"),
    "the form": (lambda document: document.update(shards="many"), "malformed manifest"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest(folder: Path, forgery: str) -> None:
    """Its own checksum fits, what it says does not."""
    edit, complaint = FORGERIES[forgery]
    document = json.loads((folder / MANIFEST_NAME).read_text())
    del document["checksum"]
    edit(document)
    (folder / MANIFEST_NAME).write_text(json.dumps(document | {"checksum": digest(document)}))
    (problem,) = orpo_data.verify(folder).problems
    assert complaint in problem


@pytest.mark.parametrize("damage", ["shorter", "gone"])
@pytest.mark.parametrize("opener", [orpo_data.load, orpo_data.scan])
def test_opening_notices_a_shard_of_another_size(folder: Path, damage: str, opener: Callable[..., Any]) -> None:
    file = folder / "train" / "data-00000-of-00002.arrow"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(OrpoError, match=r"train/data-00000-of-00002\.arrow: .*the manifest says") as caught:
        opener(folder)
    assert "\n" not in str(caught.value)


def test_no_dataset(tmp_path: Path) -> None:
    (problem,) = orpo_data.verify(tmp_path).problems
    assert problem == f"{tmp_path}: not a dataset folder (it has no {MANIFEST_NAME})"
    assert not orpo_data.verify(tmp_path / "absent").ok
