"""The evaluation stage: figures before and after on held-out pairs, as JSON and as a page."""

import json
import math
import shutil
from pathlib import Path

import pytest

import orpo_data
from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from pipelines import evaluation
from pipelines.evaluation import EvaluationReport, evaluate_model, evaluation_table
from pipelines.recipe import EvaluateConfig
from pipelines.training import train_model

METRICS = {"pair_accuracy", "margin", "log_odds_ratio", "nll", "logps_chosen", "logps_rejected"}
SETTINGS = EvaluateConfig(samples=2, max_new_tokens=8)


@pytest.fixture(scope="module")
def evaluated(trained, prepared, tmp_path_factory) -> EvaluationReport:
    output = tmp_path_factory.mktemp("evaluated") / "evaluate"
    return evaluate_model(trained.path, prepared / "tokenize", output, SETTINGS)


def test_folder_is_complete_and_sound(evaluated):
    names = {path.name for path in evaluated.path.iterdir()}
    assert names == {"_lineage.ndjson", "_manifest.json", "curves.png", "evaluation.json", "report.html"}
    assert orpo_data.verify(evaluated.path).ok
    assert [path.name for path in evaluated.path.parent.iterdir()] == ["evaluate"]


def test_figures_before_and_after(evaluated, prepared, tiny_model_dir):
    result = evaluated.result
    held_out = orpo_data.load(prepared / "tokenize", split="eval")
    assert (result["model"], result["base_model"]) == ("model", tiny_model_dir.name)
    assert result["pairs"] == len(held_out)
    assert len(result["dataset"]) >= 12
    assert read_manifest(prepared / "tokenize").fingerprint.startswith(result["dataset"])
    for side in ("before", "after"):
        assert set(result[side]) == METRICS
        assert all(map(math.isfinite, result[side].values()))
        assert result[side]["margin"] == pytest.approx(
            result[side]["logps_chosen"] - result[side]["logps_rejected"], abs=1e-5
        )
        ratios = result["per_pair"][f"{side}_margin"]
        assert sum(ratios) / len(ratios) == pytest.approx(result[side]["log_odds_ratio"], abs=1e-5)
    assert result["per_pair"]["id"] == held_out["id"]
    assert result["after"]["nll"] < result["before"]["nll"]


def test_after_is_what_training_measured_at_its_end(evaluated, trained):
    after = evaluated.result["after"]
    assert after["log_odds_ratio"] == pytest.approx(trained.metrics["eval/log_odds_chosen"], abs=1e-4)
    assert after["nll"] == pytest.approx(trained.metrics["eval/nll_loss"], abs=1e-4)
    assert after["pair_accuracy"] == pytest.approx(trained.metrics["eval/rewards/accuracies"])


def test_samples_carry_the_text_they_answer(evaluated, prepared):
    pairs = {row["id"]: row for row in orpo_data.load(prepared / "split", split="eval")}
    samples = evaluated.result["samples"]
    assert len(samples) == 2
    for sample in samples:
        assert set(sample) == {"id", "prompt", "chosen", "before", "after"}
        assert sample["prompt"] == pairs[sample["id"]]["prompt"][-1]["content"]
        assert sample["chosen"] == pairs[sample["id"]]["chosen"][-1]["content"]
        assert isinstance(sample["before"], str)
        assert isinstance(sample["after"], str)


def test_samples_without_the_text_dataset_are_left_empty(trained, prepared, tmp_path):
    alone = shutil.copytree(prepared / "tokenize", tmp_path / "alone")
    result = evaluate_model(trained.path, alone, tmp_path / "evaluate", SETTINGS).result
    assert [(sample["prompt"], sample["chosen"]) for sample in result["samples"]] == [("", "")] * 2


def test_page_stands_alone_and_escapes_what_models_say(evaluated, trained, prepared, tmp_path, monkeypatch):
    page = (evaluated.path / "report.html").read_text()
    assert "Evaluation of model" in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    judge = evaluation.evaluate

    def evil(*arguments, **settings):
        result = judge(*arguments, **settings)
        result["samples"][0]["after"] = "<script>alert(1)</script>"
        return result

    monkeypatch.setattr(evaluation, "evaluate", evil)
    report = evaluate_model(trained.path, prepared / "tokenize", tmp_path / "evaluate", SETTINGS)
    assert "<script>alert(1)" not in (report.path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in (report.path / "report.html").read_text()


def test_max_pairs_scores_the_first_ones(trained, prepared, tmp_path, evaluated):
    few = EvaluateConfig(max_pairs=3, samples=0)
    result = evaluate_model(trained.path, prepared / "tokenize", tmp_path / "evaluate", few).result
    assert (result["pairs"], result["samples"]) == (3, [])
    assert result["per_pair"]["id"] == evaluated.result["per_pair"]["id"][:3]
    assert result["per_pair"]["after_margin"] == pytest.approx(
        evaluated.result["per_pair"]["after_margin"][:3], abs=1e-5
    )


def test_unchanged_is_not_judged_again(evaluated, trained, prepared, monkeypatch):
    monkeypatch.delattr(evaluation, "evaluate")
    again = evaluate_model(trained.path, prepared / "tokenize", evaluated.path, SETTINGS)
    assert (again.ran, again.why, again.result) == (False, "unchanged", evaluated.result)


def test_changed_setting_is_judged_again(evaluated, trained, prepared, tmp_path):
    own = shutil.copytree(evaluated.path, tmp_path / "evaluate")
    fewer = EvaluateConfig(samples=1, max_new_tokens=8)
    report = evaluate_model(trained.path, prepared / "tokenize", own, fewer)
    assert (report.ran, report.why) == (True, "changed: config.samples: 2 -> 1")
    assert len(report.result["samples"]) == 1


def test_a_model_trained_anew_is_judged_again(evaluated, prepared, tiny_training, tmp_path):
    own = shutil.copytree(evaluated.path, tmp_path / "evaluate")
    model = train_model(prepared / "tokenize", tiny_training(max_steps=1), tmp_path / "model", job="test")
    report = evaluate_model(model.path, prepared / "tokenize", own, SETTINGS)
    assert report.ran
    assert "inputs[0]" in report.why


def test_same_figures_every_time(evaluated, trained, prepared, tmp_path):
    again = evaluate_model(trained.path, prepared / "tokenize", tmp_path / "evaluate", SETTINGS)
    assert (again.path / "evaluation.json").read_bytes() == (evaluated.path / "evaluation.json").read_bytes()


def test_foreign_model_has_no_before(tiny_model_dir, prepared, tmp_path):
    report = evaluate_model(tiny_model_dir, prepared / "tokenize", tmp_path / "evaluate", SETTINGS)
    assert report.result["before"] is None
    assert report.result["base_model"] is None
    assert set(report.result["after"]) == METRICS
    assert report.result["samples"][0]["before"] is None
    assert (report.path / "report.html").stat().st_size > 0
    assert not (report.path / "curves.png").exists()
    assert evaluation_table(report.result).row_count == len(METRICS)


def test_base_model_without_a_tokenizer(evaluated, prepared, tiny_training, tiny_model_dir, tmp_path):
    """The dataset's tokenizer lies beside the trained model; the base model needs none."""
    base = tmp_path / "bare"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_model_dir / name, base / name)
    model = train_model(prepared / "tokenize", tiny_training(model=str(base)), tmp_path / "model", job="test")
    result = evaluate_model(model.path, prepared / "tokenize", tmp_path / "evaluate", SETTINGS).result
    assert result["base_model"] == "bare"
    assert result["before"] == pytest.approx(evaluated.result["before"], abs=1e-5)
    assert [sample["before"] for sample in result["samples"]] == [
        sample["before"] for sample in evaluated.result["samples"]
    ]


def test_lineage_goes_through_the_model(evaluated, trained):
    stages = [node.manifest.stage for node in orpo_data.lineage(evaluated.path).nodes]
    assert stages[-2:] == ["train", "evaluate"]
    assert {"ingest", "binarize", "clean", "split", "tokenize"} <= set(stages)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["clean", "split"])
def test_dataset_of_another_stage_is_refused(trained, prepared, tmp_path, stage):
    with pytest.raises(OrpoError, match=f"is the output of {stage}, .* the output of tokenize"):
        evaluate_model(trained.path, prepared / stage, tmp_path / "evaluate", SETTINGS)


def test_empty_eval_split_names_the_key(trained, make_recipe, tmp_path):
    from pipelines import prepare

    prepare(make_recipe("split.eval_fraction=0.0"), tmp_path / "run")
    with pytest.raises(OrpoError, match=r"the eval split is empty; raise split\.eval_fraction"):
        evaluate_model(trained.path, tmp_path / "run" / "tokenize", tmp_path / "evaluate", SETTINGS)


def test_folder_without_a_model_is_named(prepared, tmp_path):
    with pytest.raises(OrpoError, match="clean: no model folder"):
        evaluate_model(prepared / "clean", prepared / "tokenize", tmp_path / "evaluate", SETTINGS)


def test_the_folder_of_a_run_names_that_of_its_model(trained, prepared, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run" / "model")
    with pytest.raises(OrpoError, match=rf"run: no model folder .*; its model is in {tmp_path}/run/model$"):
        evaluate_model(tmp_path / "run", prepared / "tokenize", tmp_path / "evaluate", SETTINGS)


@pytest.mark.parametrize("victim", ["tokenize", "clean"])
def test_a_dataset_is_not_replaced_by_an_evaluation(trained, own_run, snapshot, victim):
    before = snapshot(own_run)
    with pytest.raises(OrpoError, match=f"holds the output of {victim}"):
        evaluate_model(trained.path, own_run / "tokenize", own_run / victim, SETTINGS)
    assert snapshot(own_run) == before


def test_the_model_is_not_replaced_by_its_evaluation(trained, prepared, tmp_path, snapshot):
    own = Path(shutil.copytree(trained.path, tmp_path / "model"))
    before = snapshot(own)
    with pytest.raises(OrpoError, match="holds the output of train"):
        evaluate_model(own, prepared / "tokenize", own, SETTINGS)
    assert snapshot(own) == before


def test_evaluate_command(orpo, trained, prepared, tmp_path):
    done = orpo("evaluate", trained.path, "--dataset", prepared / "tokenize", "-o", tmp_path / "e", "--json")
    assert done.code == 0
    told = json.loads(done.out)
    assert set(told) == METRICS | {"path"}
    text = orpo("evaluate", trained.path, "--dataset", prepared / "tokenize", "-o", tmp_path / "e")
    assert all(name in text.out for name in METRICS)
    assert f"{told['log_odds_ratio']:.4f}" in text.out
    assert str(tmp_path / "e" / "report.html") in text.out


def test_courses_are_those_of_the_run(evaluated, trained, tiny_model_dir, prepared, tmp_path):
    lines = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    expected = [line for line in lines if "eval/loss" in line]
    assert expected
    assert evaluated.result["training"] == expected
    foreign = evaluate_model(tiny_model_dir, prepared / "tokenize", tmp_path / "e", SETTINGS)
    assert foreign.result["training"] == []
