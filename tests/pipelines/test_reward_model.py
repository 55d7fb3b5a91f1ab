"""A reward model as a stage makes it and as a user takes it: with its tokenizer, its card and its evaluation."""

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import orpo_data
from orpo_train.reward import load_reward_model, score
from pipelines.evaluation import evaluate_model
from pipelines.training import ModelReport, train_model


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, prepared, tiny_training) -> ModelReport:
    output = tmp_path_factory.mktemp("reward") / "model"
    return train_model(prepared / "tokenize", tiny_training(objective="reward"), output, job="test")


def test_folder_has_what_a_model_folder_has_but_no_way_to_generate(reward_model):
    assert {path.name for path in reward_model.path.iterdir()} == {
        *("README.md", "_lineage.ndjson", "_manifest.json", "chat_template.jinja", "config.json", "curves.png"),
        *("metrics.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "train.json"),
    }
    assert orpo_data.verify(reward_model.path).ok
    assert reward_model.metrics["eval/rewards/accuracies"] >= 0


def test_padded_with_its_own_tokenizer_it_gives_every_sequence_its_score(reward_model, prepared):
    """Padding is not the end of a turn: transformers reads a score at the last token that is no padding."""
    rows = orpo_data.load(prepared / "tokenize", split="train")[:5]["chosen_input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(reward_model.path)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model.path)
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.pad_token_id not in {ids[-1] for ids in rows}
    theirs = model(**tokenizer.pad({"input_ids": rows}, return_tensors="pt")).logits[:, 0]
    assert theirs.tolist() == pytest.approx(score(load_reward_model(reward_model.path), rows).tolist(), abs=1e-4)


def test_model_card_example_reads_the_score_where_it_was_trained(reward_model, prepared, monkeypatch, capsys):
    card = (reward_model.path / "README.md").read_text()
    example = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(reward_model.path)
    names: dict[str, object] = {}
    exec(example, names)
    printed = [float(line) for line in capsys.readouterr().out.split()]
    assert len(printed) == 2
    end = {ids[-1] for ids in orpo_data.load(prepared / "tokenize", split="train")["chosen_input_ids"][:3]}
    tokenizer = AutoTokenizer.from_pretrained(reward_model.path)
    assert {tokenizer(names["text"], add_special_tokens=False)["input_ids"][-1]} <= end
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "text-classification"
    assert "supervised loss" not in card
    assert "| rewards/accuracies |" in card


def test_evaluation_says_how_often_it_is_right_and_how_sure(reward_model, prepared, tmp_path):
    report = evaluate_model(reward_model.path, prepared / "tokenize", tmp_path / "evaluate")
    held_out = orpo_data.load(prepared / "tokenize", split="eval")
    after = report.result["after"]
    assert after["pair_accuracy"] == pytest.approx(reward_model.metrics["eval/rewards/accuracies"])
    assert sum(part["pairs"] for part in report.result["calibration"]) == report.result["pairs"] == len(held_out)
    page = (report.path / "report.html").read_text()
    for words in ("Calibration error", "Whether it knows how sure to be", "by score of chosen minus rejected"):
        assert words in page
    assert not re.search(r"log odds|log prob", page)


def test_its_command_line_is_that_of_every_objective(orpo, own_run, tiny_model_dir):
    sets = ["--set", "train.objective=reward", "--set", "train.max_steps=1", "--set", "train.precision=fp32"]
    called = orpo("train", "--dataset", own_run / "tokenize", "--model", tiny_model_dir, *sets)
    assert called.code == 0, called.err
    assert "eval/rewards/accuracies" in called.out
    called = orpo("evaluate", own_run / "model", "--dataset", own_run / "tokenize")
    assert called.code == 0, called.err
    assert "calibration_error" in called.out
    assert Path(own_run / "evaluate" / "report.html").exists()
