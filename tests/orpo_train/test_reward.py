"""Reward models: one score for a sequence, the same however it is run, and the folder that transformers opens."""

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from orpo_data.errors import OrpoError
from orpo_train.batching import PairDataset
from orpo_train.loop import train
from orpo_train.model import choose_layout
from orpo_train.reward import Judge, RewardScorer, is_reward_model, load_reward_model, score
from orpo_train.reward_evaluation import calibration_bins, calibration_error, evaluate_reward

Make = Callable[..., Any]
KINDS = ["llama", "gpt2", "opt", "opt-projected", "mistral-window", "qwen2", "phi", "gemma3-window", "bloom"]
PACKED = ["llama", "gpt2", "opt", "opt-projected", "mistral-window", "qwen2", "phi", "gemma3-window"]


@pytest.fixture
def trained(make_model: Make, make_table: Make, make_config: Make, tmp_path: Path) -> Callable[..., Path]:
    """A reward model of ten pairs, trained from a causal language model."""

    def make(kind: str = "llama", **settings: Any) -> Path:
        make_model(kind, scale=1.0).save_pretrained(tmp_path / "base")
        config = make_config(**{"model": str(tmp_path / "base"), "objective": "reward", "epochs": 8} | settings)
        train(config, make_table(10), make_table(3, seed=1), tmp_path / "model", "f" * 64)
        return tmp_path / "model"

    return make


@pytest.fixture
def chat_tokenizer(chat_tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(chat_tokenizer_dir)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_what_transformers_gives_the_sequence_alone(kind: str, make_model: Make) -> None:
    model = make_model(kind, scalar_head=True).eval()
    sequences = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 2], [5, 6, 0]]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in [*sequences[:3]]]
    found = score(model, sequences, tokens_per_pass=8)
    assert found[:3].tolist() == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert found.tolist() == pytest.approx(score(model, sequences, tokens_per_pass=1).tolist(), rel=1e-4, abs=1e-5)


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(3, 500), min_size=1, max_size=9), max_size=8), st.integers(1, 60))
def test_neither_order_nor_company_changes_a_score(make_model: Make, sequences: list[list[int]], tokens: int) -> None:
    model = make_model(scalar_head=True)
    together = score(model, sequences, tokens)
    assert together.tolist() == pytest.approx([score(model, [ids]).item() for ids in sequences], rel=1e-4, abs=1e-4)
    assert score(model, sequences[::-1], tokens).tolist() == pytest.approx(together.tolist()[::-1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_pairs_have_the_scores_of_their_sequences(kind: str, make_model: Make, make_table: Make) -> None:
    model, data = make_model(kind, scalar_head=True), PairDataset(make_table(6))
    assert choose_layout(model, data, "auto", RewardScorer) == "sdpa"


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "opt-projected"])
def test_training_leaves_a_folder_that_transformers_opens(kind: str, trained: Make, make_table: Make) -> None:
    folder = trained(kind)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.num_labels == 1
    assert is_reward_model(folder)
    rows = make_table(10).to_pylist()
    better, worse = (score(model, [row[f"{side}_input_ids"] for row in rows]) for side in ("chosen", "rejected"))
    assert (better > worse).all(), "ten pairs are learnt by heart"


def test_the_figures_of_training_are_those_of_the_evaluation(
    trained: Make, make_table: Make, make_config: Make
) -> None:
    folder = trained(epochs=2)
    result = evaluate_reward(folder, make_table(3, seed=1))
    *_, held_out = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert set(held_out) == {
        *("step", "eval/loss", "eval/rewards/chosen", "eval/rewards/rejected"),
        *("eval/rewards/accuracies", "eval/rewards/margins"),
    }
    assert result["after"]["loss"] == pytest.approx(held_out["eval/loss"], rel=1e-4)
    assert result["after"]["pair_accuracy"] == pytest.approx(held_out["eval/rewards/accuracies"])
    assert result["after"]["margin"] == pytest.approx(held_out["eval/rewards/margins"], rel=1e-3, abs=1e-5)
    assert (folder / "curves.png").stat().st_size


def test_adapters_and_the_head_are_trained_and_merged(trained: Make, make_table: Make) -> None:
    folder = trained(lora={"rank": 4}, learning_rate=3e-2, epochs=12)
    rows = make_table(10).to_pylist()
    model = load_reward_model(folder)
    better, worse = (score(model, [row[f"{side}_input_ids"] for row in rows]) for side in ("chosen", "rejected"))
    assert (better > worse).float().mean() > 0.8
    result = evaluate_reward(folder, make_table(10))
    assert result["after"]["pair_accuracy"] == pytest.approx((better > worse).float().mean().item())


def test_the_new_head_follows_from_the_seed(trained: Make, tmp_path: Path) -> None:
    heads = [load_reward_model(trained(epochs=1, max_steps=1, seed=seed)).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    """Three pairs of confidence 3/4, two of them right, and one of 9/10 that is right.

    Bins: accuracy 2/3 against 3/4, and 1 against 9/10. The error is (3 * |2/3 - 3/4| + 1 * |1 - 9/10|) / 4.
    """
    margins = torch.tensor([math.log(3), math.log(3), -math.log(3), math.log(9)])
    low, high = calibration_bins(margins)
    assert (low.pairs, high.pairs) == (3, 1)
    assert (low.confidence, low.accuracy) == pytest.approx((0.75, 2 / 3))
    assert (high.confidence, high.accuracy) == pytest.approx((0.9, 1.0))
    assert calibration_error([low, high]) == pytest.approx((3 / 12 + 1 / 10) / 4)


def test_bins_are_a_twentieth_wide() -> None:
    """Confidences .62 and .64 share the bin from .60 to .65, .66 lies in the next one, .50 in the first, 1 in the
    last."""
    margins = torch.tensor([0.62, 0.64, 0.66, 0.5]).logit()
    bins = calibration_bins(torch.cat([margins, torch.tensor([90.0])]))
    assert [part.pairs for part in bins] == [1, 2, 1, 1]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_every_pair_is_in_one_bin(margins: list[float]) -> None:
    bins = calibration_bins(torch.tensor(margins))
    assert sum(part.pairs for part in bins) == len(margins)
    assert all(0.5 <= part.confidence <= 1 for part in bins)
    assert 0 <= calibration_error(bins) <= 1
    right = sum(part.pairs * part.accuracy for part in bins)
    assert right == pytest.approx(sum(torch.tensor(margins) > 0))


def test_a_model_that_cannot_tell_is_sure_of_nothing_and_right_never() -> None:
    (only,) = calibration_bins(torch.zeros(4))
    assert (only.pairs, only.confidence, only.accuracy) == (4, 0.5, 0.0)


# --- another tokenizer, and what is refused --------------------------------------------------------------------------


def test_a_judge_with_the_same_tokenizer_takes_ids_as_they_are(
    make_model: Make, chat_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _saved(make_model, chat_tokenizer, tmp_path)
    judge = Judge.load(folder, chat_tokenizer)
    assert judge([[5, 6, 7]]).tolist() == score(load_reward_model(folder), [[5, 6, 7]]).tolist()
    assert "tokenizer" not in caplog.text


def test_a_judge_with_another_tokenizer_reads_the_text_and_says_so(
    make_model: Make, chat_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _saved(make_model, chat_tokenizer, tmp_path)
    other = copy.deepcopy(chat_tokenizer)
    other.add_tokens(["colour"])  # one token here, several there
    text = "<|im_start|>user\nA colour?<|im_end|>"
    with caplog.at_level(logging.WARNING):
        judge = Judge.load(folder, other)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} has another tokenizer: what it judges is decoded and tokenized again"
    ]
    theirs, own = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (other, chat_tokenizer))
    assert theirs != own
    assert judge([theirs]).tolist() == score(load_reward_model(folder), [own]).tolist()


def _saved(make_model: Make, tokenizer: Any, folder: Path) -> Path:
    make_model(scalar_head=True).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return folder / "rm"


def test_a_score_that_is_not_a_number_is_one_line(make_model: Make) -> None:
    model = make_model(scalar_head=True)
    with torch.no_grad():
        model.score.weight[0, 0] = torch.nan
    with pytest.raises(OrpoError, match="gives sequence 0 the score nan, not a number"):
        score(model, [[5, 6]])


def test_a_sequence_beyond_the_models_positions_is_one_line(make_model: Make) -> None:
    with pytest.raises(OrpoError, match="a sequence has 300 tokens, the reward model takes 256"):
        score(make_model(scalar_head=True), [[5], [7] * 300])


def test_a_pass_that_fails_leaves_the_mode(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(scalar_head=True).train()
    monkeypatch.setattr(model.base_model, "forward", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        score(model, [[5, 6]])
    assert model.training


def test_a_new_head_is_no_news(model_folder: Make, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers would print a table of it; what is missing is an error of ours, or meant."""
    load_reward_model(model_folder(), new_head=True)
    assert "score.weight" not in "".join(capfd.readouterr())
    assert logging.getLogger("transformers").level != logging.ERROR


def test_a_language_model_is_no_reward_model(model_folder: Make) -> None:
    assert not is_reward_model(model_folder())
    with pytest.raises(OrpoError, match=r"is no reward model: it lacks score\.weight; train one with objective reward"):
        load_reward_model(model_folder())


def test_an_architecture_without_scalar_heads_is_one_line(model_folder: Make) -> None:
    with pytest.raises(OrpoError, match="cannot load"):
        load_reward_model(model_folder("cohere-scaled"), new_head=True)
