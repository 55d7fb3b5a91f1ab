"""PPO as a training stage: its judge in the lineage, with the commands and files that every objective has."""

import json
import shutil

import pytest

import orpo_data
from orpo_data.manifest import read_manifest
from pipelines.training import model_fingerprint, train_model


@pytest.fixture(scope="module")
def judge(tmp_path_factory, prepared, tiny_training):
    output = tmp_path_factory.mktemp("judge") / "model"
    return train_model(prepared / "tokenize", tiny_training(objective="reward"), output, job="test").path


@pytest.fixture(scope="module")
def ppo_model(tmp_path_factory, prepared, tiny_training, judge):
    config = tiny_training(
        objective="ppo", max_steps=2, micro_batch_size=4, ppo={"reward_model": str(judge), "max_new_tokens": 4}
    )
    return train_model(prepared / "tokenize", config, tmp_path_factory.mktemp("ppo") / "model", job="test")


def test_folder_is_complete_and_names_its_judge(ppo_model, judge):
    assert orpo_data.verify(ppo_model.path).ok
    inputs = read_manifest(ppo_model.path).inputs
    assert [item.name for item in inputs][2] == str(judge)
    assert inputs[2].fingerprint == model_fingerprint(judge)
    card = (ppo_model.path / "README.md").read_text()
    assert "objective `ppo`" in card
    assert "'kl': 0.1" in card
    assert "supervised loss" not in card
    assert f"`{inputs[2].fingerprint[:12]}`" in card


def test_figures_are_those_of_answers(ppo_model):
    lines = [json.loads(line) for line in (ppo_model.path / "metrics.jsonl").read_text().splitlines()]
    training, held_out = lines[0], lines[-1]
    assert {"loss", "policy_loss", "value_loss", "score", "kl", "reward", "answer_tokens"} <= training.keys()
    assert {"eval/loss", "eval/score", "eval/kl", "eval/reward"} <= held_out.keys()
    assert ppo_model.metrics["eval/score"] == held_out["eval/score"]


def test_where_the_judge_lies_decides_nothing(ppo_model, prepared, tiny_training, judge, tmp_path):
    moved = shutil.copytree(judge, tmp_path / "elsewhere")
    settings = {"objective": "ppo", "max_steps": 2, "micro_batch_size": 4}
    config = tiny_training(**settings, ppo={"reward_model": str(moved), "max_new_tokens": 4})
    own = shutil.copytree(ppo_model.path, tmp_path / "model")
    assert not train_model(prepared / "tokenize", config, own, job="test").ran


def test_its_command_line_is_that_of_every_objective(orpo, own_run, tiny_model_dir, judge):
    values = {"objective": "ppo", "max_steps": 1, "precision": "fp32", "batch_size": 2, "ppo.max_new_tokens": 3}
    sets = [part for key, value in values.items() for part in ("--set", f"train.{key}={value}")]
    arguments = ["train", "--dataset", own_run / "tokenize", "--model", tiny_model_dir, *sets]
    called = orpo(*arguments)
    assert called.code == 2
    assert "ppo.reward_model" in called.err
    called = orpo(*arguments, "--set", f"train.ppo.reward_model={judge}")
    assert called.code == 0, called.err
    assert "eval/score" in called.out
    called = orpo("evaluate", own_run / "model", "--dataset", own_run / "tokenize")
    assert called.code == 0, called.err
