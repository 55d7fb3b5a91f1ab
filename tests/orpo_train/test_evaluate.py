"""How a model judges held-out pairs: the figures by hand, their order, and before against after."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from orpo_data.errors import OrpoError
from orpo_data.schema import ANSWERS
from orpo_train.batching import Limits, PairDataset, tree_of
from orpo_train.evaluate import PairScores, evaluate, greedy_answers, score_pairs, summarise
from orpo_train.model import SequenceScorer, pair_sums
from orpo_train.objectives import log_odds

Make = Callable[..., Any]


def test_summary_by_hand() -> None:
    """Two pairs of three have the likelier chosen answer: a tie is no win. Margins 1, -2, 0; NLL per token 1, 2, 6."""
    scores = PairScores(
        pairs=np.arange(3),
        chosen=np.array([-1, -3, -2], np.float32),
        rejected=np.array([-2, -1, -2], np.float32),
        nll_sum=np.array([2, 8, 6], np.float32),
        nll_tokens=np.array([2, 4, 1], np.float32),
        log_odds_ratio=np.array([1.5, -3, 0], np.float32),
    )
    assert summarise(scores) == pytest.approx(
        {
            "pair_accuracy": 1 / 3,
            "margin": -1 / 3,
            "log_odds_ratio": -0.5,
            "nll": 3.0,
            "logps_chosen": -2.0,
            "logps_rejected": -5 / 3,
        }
    )


@settings(max_examples=10)
@given(
    tokens=st.integers(36, 300),
    layout=st.sampled_from(["sdpa", "plain"]),
    world=st.integers(1, 3),
    scope=st.sampled_from(["response", "prompt+response"]),
)
def test_each_pair_is_scored_once_as_training_would(
    make_model: Make, make_table: Make, tokens: int, layout: str, world: int, scope: str
) -> None:
    """Over all processes, however many there are and however much a forward pass holds."""
    data, plain = PairDataset(make_table(9)), SequenceScorer(make_model())
    scorer, limits = SequenceScorer(make_model(), layout), Limits(max(tokens, 2 * data.longest))
    shares = [score_pairs(scorer, data, np.arange(9), scope, limits, rank, world) for rank in range(world)]  # type: ignore[arg-type]
    assert sorted(pair for share in shares for pair in share.pairs) == list(range(9))
    for share in shares:
        assert share.pairs.tolist() == sorted(share.pairs)
        for place, pair in enumerate(share.pairs):
            batch = plain.collate(data, [tree_of(data, [int(pair)], ANSWERS)], scope)  # type: ignore[arg-type]
            with torch.no_grad():
                sums = pair_sums(plain(batch), batch)
            ratio = log_odds(sums.chosen) - log_odds(sums.rejected)
            figures = (sums.chosen, sums.rejected, sums.nll_sum, sums.nll_tokens, ratio)
            expected = [int(pair), *(value.item() for value in figures)]
            assert [column[place] for column in vars(share).values()] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_scoring_is_without_dropout_and_leaves_the_mode(make_model: Make, make_table: Make) -> None:
    scorer, data = SequenceScorer(make_model("gpt2-dropout")).train(), PairDataset(make_table(3))
    first, second = (score_pairs(scorer, data, np.arange(3), "response") for _ in range(2))
    assert first.chosen.tolist() == second.chosen.tolist()
    assert scorer.training


def test_no_pairs_no_scores(make_model: Make, make_table: Make) -> None:
    scores = score_pairs(SequenceScorer(make_model()), PairDataset(make_table(3)), np.arange(0), "response")
    assert all(len(column) == 0 for column in vars(scores).values())


# --- whole folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(make_model: Make, chat_tokenizer_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two different models, each with the tokenizer: before and after."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chat_tokenizer_dir)
    paths = (tmp_path / "base", tmp_path / "trained")
    for seed, path in enumerate(paths):
        make_model("llama", seed=seed, scale=3.0).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_and_after(precision: str, folders: tuple[Path, Path], make_table: Make) -> None:
    base, trained = folders
    table = make_table(5)
    result = evaluate(trained, base, table, precision=precision, samples=2, max_new_tokens=4)
    assert (result["model"], result["base_model"], result["pairs"]) == ("trained", "base", 5)
    assert result["before"] == evaluate(base, None, table, precision=precision, samples=0)["after"]
    assert result["before"].keys() == result["after"].keys()
    assert result["before"] != result["after"]
    per_pair = result["per_pair"]
    assert per_pair["id"] == [f"pair-{i}" for i in range(5)]
    assert np.mean(per_pair["after_margin"]) == pytest.approx(result["after"]["log_odds_ratio"], rel=1e-5)
    assert np.mean(per_pair["before_margin"]) == pytest.approx(result["before"]["log_odds_ratio"], rel=1e-5)
    assert [sample["id"] for sample in result["samples"]] == ["pair-0", "pair-1"]
    assert all(isinstance(sample[when], str) for sample in result["samples"] for when in ("before", "after"))


def test_without_a_base_model_there_is_no_before(folders: tuple[Path, Path], make_table: Make) -> None:
    result = evaluate(folders[1], None, make_table(3), samples=1, max_new_tokens=2)
    assert result["before"] is result["base_model"] is result["per_pair"]["before_margin"] is None
    assert result["samples"][0]["before"] is None


def test_answers_are_greedy_and_without_the_prompt(folders: tuple[Path, Path], make_model: Make) -> None:
    """Against taking the likeliest token one at a time, up to the end of the turn."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders[0])
    model = make_model("llama", scale=3.0).eval()
    prompt, ids = [5, 6, 7], [5, 6, 7]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.generation_config.eos_token_id:
            break
    expected = tokenizer.decode(ids[3:], skip_special_tokens=True).strip()
    assert greedy_answers(model, tokenizer, [prompt], max_new_tokens=6) == [expected]
    assert expected


def test_a_folder_without_tokenizer_is_one_line(model_folder: Make, make_table: Make) -> None:
    with pytest.raises(OrpoError, match="has no tokenizer") as caught:
        evaluate(model_folder(), None, make_table(1), samples=1)
    assert "\n" not in str(caught.value)


def test_data_of_another_tokenizer_is_refused(folders: tuple[Path, Path], make_table: Make) -> None:
    odd: pa.Table = make_table([([1], [2], [900])])
    with pytest.raises(OrpoError, match="token id 900, the model knows 600"):
        evaluate(folders[0], None, odd)
