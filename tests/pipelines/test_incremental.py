"""Some raw files change: a run over the old output works on those alone, and ends in the bytes of a fresh one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orpo_data
from orpo_data.events import EVENTS_NAME
from orpo_data.manifest import MANIFEST_NAME, read_manifest
from pipelines import prepare, stages
from pipelines.recipe import Recipe

STAGES = ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"]
GLOBAL_STEPS = ["sources.0.count=30", "sources.1.weight=0.8", "normalise={}", "dedup={near: 0.7}", "label_noise={}"]


@pytest.fixture
def raw(own_raw_data: Path) -> Path:
    """The dialogues in five files of ten; some come in two files."""
    whole = own_raw_data / "hh/train.jsonl"
    lines = whole.read_text().splitlines()
    whole.unlink()
    for i in range(5):
        write_lines(own_raw_data / f"hh/{i}.jsonl", [*lines[10 * i : 10 * i + 10], *lines[7 * i : 7 * i + 2]])
    return own_raw_data


def write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("\n".join(lines) + "\n")


def change(file: Path) -> None:
    lines = file.read_text().splitlines()
    write_lines(file, [lines[1].replace("times a year", "times a month"), *lines[2:]])


def state(folder: Path) -> dict[str, Any]:
    """Every file but the events; of the manifest all but what stands in it of them."""
    files: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop(MANIFEST_NAME))
    del files[EVENTS_NAME], manifest["files"][EVENTS_NAME], manifest["checksum"]
    return files | {"manifest": manifest}


def inodes(folder: Path) -> set[int]:
    return {(folder / shard.path).stat().st_ino for shard in read_manifest(folder).shards}


@pytest.mark.parametrize("overrides", [[], GLOBAL_STEPS])
def test_the_same_bytes_as_in_full(
    raw: Path, tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """One file changed, one gone, one more."""
    recipe = make_recipe(*overrides, raw=raw)
    prepare(recipe, tmp_path / "run")
    shards = {stage: inodes(tmp_path / "run" / stage) for stage in STAGES}
    change(raw / "hh/3.jsonl")
    (raw / "hh/1.jsonl").rename(raw / "hh/7.jsonl")
    prepare(recipe, tmp_path / "fresh")
    read: list[str] = []
    read_records = stages.read_records
    monkeypatch.setattr(stages, "read_records", lambda file, *rest: read.append(file.name) or read_records(file, *rest))
    prepare(recipe, tmp_path / "run")
    assert read == ["3.jsonl", "7.jsonl"]
    for stage in STAGES:
        assert state(tmp_path / "run" / stage) == state(tmp_path / "fresh" / stage), stage
        assert orpo_data.verify(tmp_path / "run" / stage).ok
        if stage in ("binarize", "clean", "tokenize") and not overrides:
            assert len(shards[stage] - inodes(tmp_path / "run" / stage)) == 2 * (1 + (stage == "tokenize")), stage
