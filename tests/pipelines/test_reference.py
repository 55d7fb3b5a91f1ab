"""The reference stage: a model's log-probabilities in columns, made once, in the lineage, and asked for by name."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import orpo_data
from orpo_data import locking
from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import read_manifest
from orpo_data.schema import REFERENCED
from orpo_data.shards import read_table
from pipelines import reference as reference_module
from pipelines.evaluation import evaluate_model
from pipelines.recipe import EvaluateConfig
from pipelines.reference import reference
from pipelines.training import train_model


@pytest.fixture(scope="module")
def recipe(make_recipe, tiny_model_dir):
    def make(objective: str = "dpo", **train: object):
        settings = {"model": str(tiny_model_dir), "objective": objective, "precision": "fp32"} | train
        return make_recipe(f"train={json.dumps(settings)}")

    return make


@pytest.fixture(scope="module")
def referenced(prepared, recipe, tmp_path_factory):
    """With the columns that kto needs."""
    output = tmp_path_factory.mktemp("referenced") / "reference"
    return reference(prepared / "tokenize", recipe("kto"), output)


def naive_logp(model, ids: list[int], prompt: int) -> float:
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, torch.tensor(ids)[1:, None])[prompt - 1 :, 0].sum().item()


def test_columns_are_the_models_own_log_probabilities(referenced, prepared, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for split in ("train", "eval"):
        table, before = read_table(referenced.path, split), read_table(prepared / "tokenize", split)
        assert table.schema == REFERENCED
        assert table.select(before.column_names).equals(before), "no row and no id is touched"
    for row in read_table(referenced.path, "train").slice(0, 5).to_pylist():
        for name, column in (
            ("chosen", "chosen_input_ids"),
            ("rejected", "rejected_input_ids"),
            ("kl", "kl_input_ids"),
        ):
            expected = naive_logp(model, row[column], row["prompt_len"])
            assert row[f"ref_{name}_logps"] == pytest.approx(expected, rel=1e-4)


def test_samples_of_a_model_judged_on_it_carry_their_texts(referenced, prepared, tiny_model_dir, tmp_path):
    """The texts lie two folders up: the reference was made of tokens, these of texts."""
    found = [
        evaluate_model(tiny_model_dir, dataset, tmp_path / name, EvaluateConfig(samples=1, max_new_tokens=1)).result
        for name, dataset in (("tokens", prepared / "tokenize"), ("reference", referenced.path))
    ]
    assert found[1]["samples"] == found[0]["samples"]
    assert found[0]["samples"][0]["prompt"]


def test_each_prompt_meets_an_answer_to_another_one(referenced):
    rows = read_table(referenced.path, "train").to_pylist()
    prompts = [row["chosen_input_ids"][: row["prompt_len"]] for row in rows]
    answers = {tuple(row["chosen_input_ids"][row["prompt_len"] :]) for row in rows}
    longest = read_manifest(referenced.path).recipe["tokenize"]["max_length"]
    for row, prompt in zip(rows, prompts, strict=True):
        answer = tuple(row["kl_input_ids"][row["prompt_len"] :])
        assert row["kl_input_ids"][: row["prompt_len"]] == prompt
        assert len(answer) >= 1
        assert len(row["kl_input_ids"]) <= max(longest, row["prompt_len"] + 1)
        assert any(whole[: len(answer)] == answer for whole in answers)
        assert answer != tuple(row["chosen_input_ids"][row["prompt_len"] :])


def test_folder_is_sound_and_in_the_lineage(referenced, prepared, tiny_model_dir):
    assert orpo_data.verify(referenced.path).ok
    manifest = read_manifest(referenced.path)
    assert [item.name for item in manifest.inputs] == ["tokenize", str(tiny_model_dir)]
    assert (manifest.rows_in, manifest.drop_reasons) == (manifest.rows, {})
    stages = [node.manifest.stage for node in orpo_data.lineage(referenced.path).nodes]
    assert stages[-2:] == ["tokenize", "reference"]
    row = read_table(referenced.path, "train")["id"][0].as_py()
    (story,) = orpo_data.lineage(referenced.path, row).rows
    assert [decision.stage for decision in story.decisions][-2:] == ["tokenize", "reference"]
    assert orpo_data.load(referenced.path, "train")[0]["ref_chosen_logps"] < 0
    assert "ref_chosen_logps" in (referenced.path / "report.html").read_text()


def test_it_is_made_once_for_a_model_and_a_dataset(prepared, recipe, tiny_model_dir, tmp_path, monkeypatch):
    output = tmp_path / "reference"
    first = reference(prepared / "tokenize", recipe(), output)
    assert first.ran
    with monkeypatch.context() as patched:
        patched.delattr(reference_module.ReferenceModel, "answer_logps")
        again = reference(prepared / "tokenize", recipe("ipo", learning_rate=1.0), output)
        assert (again.ran, again.content_hash) == (False, first.content_hash), "ipo reads what dpo reads"
    for_kto = reference(prepared / "tokenize", recipe("kto"), output)
    assert "kl_length: None -> " in for_kto.why
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    moved = reference(prepared / "tokenize", recipe(model=str(other)), output)
    assert "fingerprint" in moved.why


def test_training_starts_with_ratios_of_zero(referenced, recipe, tiny_training, tmp_path):
    """The policy is still its reference: no reward, no margin, no KL; the loss of kto is then one half."""
    for objective, loss in (("dpo", 0.6931), ("ipo", 25.0), ("kto", 0.5)):
        config = tiny_training(objective=objective, max_steps=2, eval_every=1, save_every=None)
        model = train_model(referenced.path, config, tmp_path / objective / "model", job="test")
        lines = [json.loads(line) for line in (model.path / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["eval/loss"] == pytest.approx(loss, rel=1e-3)
        assert lines[1]["rewards/margins"] == pytest.approx(0, abs=1e-3)
        assert ("kl" in lines[1]) is (objective == "kto")
        card = (model.path / "README.md").read_text()
        assert f"objective `{objective}`" in card
        assert "| beta | 0.1 |" in card
        assert "supervised loss" not in card
    report = evaluate_model(model.path, referenced.path, tmp_path / "evaluate", EvaluateConfig(samples=1))
    assert report.result["samples"][0]["prompt"], "the texts lie two folders before"


# --- what is missing is one line that names the command --------------------------------------------------------------


def test_a_dataset_without_reference(prepared, tiny_training, tmp_path):
    with pytest.raises(OrpoError, match=r"tokenize: has no reference log-.*`orpo stage reference RECIPE --set train"):
        train_model(prepared / "tokenize", tiny_training(objective="dpo"), tmp_path / "model", job="test")
    with pytest.raises(OrpoError, match=r"reference: no dataset is there; `orpo stage reference RECIPE"):
        train_model(tmp_path / "reference", tiny_training(objective="dpo"), tmp_path / "model", job="test")


def test_kto_needs_more_than_dpo(prepared, recipe, tiny_training, tmp_path):
    made = reference(prepared / "tokenize", recipe("dpo"), tmp_path / "reference")
    with pytest.raises(OrpoError, match=r"no values in kl_input_ids.*reference RECIPE --set train\.objective=kto`"):
        train_model(made.path, tiny_training(objective="kto"), tmp_path / "model", job="test")


def test_a_reference_that_is_another_model(referenced, tiny_training, tiny_model_dir, tmp_path):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(OrpoError, match=r"its reference is .*, training starts from another model, .*other"):
        train_model(referenced.path, tiny_training(objective="dpo", model=str(other)), tmp_path / "model", job="test")


def test_an_objective_without_reference_is_told_so(prepared, recipe, tmp_path):
    with pytest.raises(UsageError, match="objective orpo, which needs no reference model; dpo, ipo and kto do"):
        reference(prepared / "tokenize", recipe("orpo"), tmp_path / "reference")


def test_another_writer_is_told(prepared, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "PATIENCE", 0.0)
    with (
        locking.writing(tmp_path / "reference"),
        pytest.raises(OrpoError, match=r"reference: is being written by process \d+"),
    ):
        reference(prepared / "tokenize", recipe(), tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


def test_commands_one_after_the_other(orpo, own_run, recipe_file, tiny_model_dir):
    file = recipe_file(f"train={{model: {tiny_model_dir}, objective: dpo, max_steps: 1, precision: fp32}}")
    called = orpo("train", file, "-o", own_run)
    assert called.code == 1
    assert "`orpo stage reference RECIPE" in called.err
    called = orpo("stage", "reference", file, "--input", own_run / "tokenize", "-o", own_run / "reference")
    assert called.code == 0, called.err
    called = orpo("train", file, "-o", own_run)
    assert called.code == 0, called.err
    assert "eval/rewards/margins" in called.out
    assert orpo("inspect", own_run / "reference", "--rows", 1).code == 0
