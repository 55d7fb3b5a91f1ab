"""A run whose folders lie in a bucket: by the command line, from raw files there, and what a reader makes of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from orpo_data.manifest import read_manifest
from orpo_data.places import storage
from pipelines import prepare

STAGES = ("ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize")


def orpo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=dict(os.environ))


def test_prepare_into_a_storage(make_recipe: Any, prepared: Path, memory: Path) -> None:
    """The same shards as in a folder; run again, nothing is done again."""
    recipe = make_recipe()
    reports = prepare(recipe, str(memory))
    assert [str(report.path) for report in reports] == [f"{memory}/{stage}" for stage in STAGES]
    for stage in STAGES:
        here, there = read_manifest(prepared / stage), read_manifest(memory / stage)
        assert (there.shards, there.dropped, there.content_hash) == (here.shards, here.dropped, here.content_hash)
        assert [item.path for item in there.inputs] == [item.path for item in here.inputs]
    assert not any(report.ran for report in prepare(recipe, str(memory)))


def test_signed_addresses_are_used_and_not_written_down(make_recipe: Any, memory: Path, raw_data: Path) -> None:
    url = "memory://bucket/raw/train.jsonl?X-Signature=hunter2"
    fs, _ = storage(memory)
    fs.put_file(str(raw_data / "hh/train.jsonl"), url)
    prepare(make_recipe(f"sources=[{{dataset: hh-rlhf, path: '{url}'}}]"), str(memory / "out"))
    written = [file for file in (memory / "out").rglob("*") if file.is_file()]
    assert len(written) > 30
    assert [file for file in written if b"hunter2" in file.read_bytes()] == []
