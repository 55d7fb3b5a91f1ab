"""A run whose folders lie in a bucket: raw files, datasets and models there, the bytes those of local folders."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import orpo_data
from orpo_data.manifest import read_manifest
from orpo_data.places import file_names, send, storage
from pipelines import prepare
from pipelines.evaluation import evaluate_model
from pipelines.recipe import EvaluateConfig
from pipelines.training import train_model

ROOT = Path(__file__).parents[2]
STAGES = ("ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize")


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


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def upload(prepared: Path) -> Callable[[Path], None]:
    """Put the prepared run at a place of a storage."""

    def upload(place: Path) -> None:
        for name in file_names(prepared):
            send(prepared / name, place / name)

    return upload


def test_training_from_a_storage(trained: Any, tiny_training: Any, upload: Any, memory: Path, tmp_path: Path) -> None:
    """The weights are those of training from the local folder, bit for bit."""
    upload(memory)
    report = train_model(memory / "tokenize", tiny_training(), tmp_path / "model", job="test")
    assert (report.fingerprint, report.content_hash) == (trained.fingerprint, trained.content_hash)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (trained.path / "model.safetensors").read_bytes()
    assert read_manifest(tmp_path / "model").inputs[0].path == f"{memory}/tokenize"
    stages = [node.manifest.stage for node in orpo_data.lineage(tmp_path / "model").nodes]
    assert stages == ["ingest", "ingest", "binarize", "clean", "split", "tokenize", "train"]


def test_a_model_on_a_storage(trained: Any, tiny_training: Any, upload: Any, memory: Path) -> None:
    """Made on this machine and sent there whole; judged from there."""
    upload(memory)
    report = train_model(memory / "tokenize", tiny_training(), memory / "model", job="test")
    assert report.content_hash == trained.content_hash
    assert orpo_data.verify(memory / "model").ok
    assert not train_model(memory / "tokenize", tiny_training(), memory / "model", job="test").ran
    settings = EvaluateConfig(samples=0, max_pairs=2)
    judged = evaluate_model(memory / "model", memory / "tokenize", memory / "evaluate", settings)
    assert judged.result["pairs"] == 2
    assert orpo_data.verify(memory / "evaluate").ok
    assert [item.path for item in read_manifest(memory / "evaluate").inputs] == ["../model", None, "../tokenize"]
    assert [path.name for path in memory.iterdir() if path.name.endswith(".partial")] == []


@pytest.mark.slow
def test_two_processes_train_from_a_bucket(
    upload: Any, s3: Path, prepared: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Launched by accelerate, over one cache: the weights are those of two processes over the local folder."""
    upload(s3)
    script = tmp_path / "orpo.py"
    script.write_text("from flows.cli import main\n\nmain()\n")
    settings = ["max_steps=3", "batch_size=4", "micro_batch_size=1", "precision=fp32"]
    for name, dataset in (("folder", prepared / "tokenize"), ("bucket", s3 / "tokenize")):
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "orpo_train/launch/cpu.yaml"),
            *("--num_processes", "2", script, "train", "--dataset", dataset, "--model", tiny_model_dir),
            *("-o", tmp_path / name, *(word for s in settings for word in ("--set", f"train.{s}"))),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("folder", "bucket"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=0)
