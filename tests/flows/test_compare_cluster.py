"""A comparison whose trainings run on the workers of a cluster, of which one is killed: the models of a run without."""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.compare import ComparisonError, compare_flow

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

LEAST = "max_steps: 2, batch_size: 4, precision: fp32, learning_rate: 0.01, eval_every: 1"
METHODS = "judge: {}, sft: {}, dpo: {}, orpo: {}"
MODELS = ["judge", "sft,seed=1", "dpo,seed=1", "orpo,lambda=0.1,seed=1"]


@pytest.fixture
def comparing(recipe_file: Callable[..., str], tiny_model_dir: Path) -> Callable[..., str]:
    """A recipe of a few quick trainings, as a file."""
    compare = "{seeds: [1], prompts: 2, sampling: {max_new_tokens: 4}, methods: {%s}}"
    train = f"train={{model: '{tiny_model_dir}', {LEAST}}}"
    return lambda methods=METHODS, *more: recipe_file(train, f"compare={compare % methods}", *more)


@pytest.fixture
def compare(prepared: Path) -> Callable[..., Any]:
    """The flow into a folder where the data lies already: (what it hands on, hash of each model's weights)."""

    def run(recipe: str, root: Path) -> tuple[Any, dict[str, str]]:
        shutil.copytree(prepared, root)
        comparison = compare_flow(recipe, output=str(root))["comparison"]
        files = {name: root / "compare" / name / "model/model.safetensors" for name in MODELS}
        return comparison, {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}

    return run


def test_two_dask_workers_of_which_one_is_killed(
    comparing: Any, compare: Any, tmp_path: Path, dask_cluster: Any, killed_when: Any
) -> None:
    """When the judge is trained and policies are being."""
    here, weights = compare(comparing(), tmp_path / "here")
    address, workers = dask_cluster
    on_dask = comparing(METHODS, f"runner={{kind: dask, address: {json.dumps(address)}}}")
    with killed_when(tmp_path / "there/compare/judge/model/_manifest.json", workers[0]):
        there, others = compare(on_dask, tmp_path / "there")
    assert workers[0].wait(timeout=10) == -signal.SIGKILL
    assert workers[1].poll() is None
    assert others == weights
    assert len({*weights.values()}) == len(MODELS)
    for figures in ("held_out", "win_rates", "answers", "ratios", "reward_models"):
        assert there[figures] == here[figures], figures


def test_what_a_training_that_cannot_run_does_not_touch_goes_on(comparing: Any, prepared: Path, tmp_path: Path) -> None:
    """No answer of the data fits into four tokens, so DPO stops before its first step."""
    recipe = comparing("judge: {}, sft: {}, dpo: {micro_batch_tokens: 4}, orpo: {}")
    shutil.copytree(prepared, tmp_path / "run")
    with pytest.raises(
        ComparisonError, match=r"2 runs failed, the first is dpo,seed=1: .*micro_batch_tokens"
    ) as failed:
        compare_flow(recipe, output=str(tmp_path / "run"))
    comparison = failed.value.result["comparison"]
    assert {run["name"] for run in comparison["runs"]} == {*MODELS} - {"dpo,seed=1"}
    assert comparison["failed"][1]["error"] == "not run: it needs dpo,seed=1"
    assert comparison["win_rates"]["orpo lambda=0.1"]["sft"]["n"] == 1
    assert "micro_batch_tokens" in (tmp_path / "run/compare/report.html").read_text()
