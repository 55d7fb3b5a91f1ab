"""Our losses and TRL's, on the same token ids and the same log-probabilities, by TRL's own code."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import orpo_data
from orpo_data.schema import ANSWERS
from orpo_data.shards import read_table
from orpo_train.batching import PairDataset, tree_of
from orpo_train.layout import Batch
from orpo_train.model import PairSums, SequenceScorer, load_model
from orpo_train.objectives import OBJECTIVES, PairLogps
from orpo_train.reward import RewardScorer, load_reward_model
from orpo_train.step import NllMean, pair_logps
from pipelines.reference import reference

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

PAIRS = 3


@pytest.fixture(scope="module")
def table(prepared: Path, make_recipe: Any, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A few pairs with the log-probabilities of the reference."""
    recipe = make_recipe(f"train={{model: {tiny_model_dir}, objective: kto, precision: fp32}}")
    report = reference(prepared / "tokenize", recipe, tmp_path_factory.mktemp("reference") / "reference")
    return read_table(report.path, "train").slice(0, PAIRS)


@pytest.fixture
def policy(tiny_model_dir: Path) -> Any:
    """The reference after some training, so to speak."""
    return moved(load_model(tiny_model_dir))


def moved(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval()


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"output_dir": str(tmp_path / "trl"), "report_to": [], "use_cpu": True, "bf16": False, "beta": 0.3}


def run(model: Any, table: Any, scorer: type = SequenceScorer) -> tuple[Batch, PairSums, Any]:
    data = PairDataset(table)
    own = scorer(model)
    batch = own.collate(data, [tree_of(data, [pair], ANSWERS) for pair in range(PAIRS)], "response")
    with torch.no_grad():
        values = own(batch)
    return batch, own.sums(values, batch), values


def our_pairs(model: Any, table: Any, kl: float = float("nan")) -> PairLogps:
    batch, sums, _ = run(model, table)
    return pair_logps(sums, batch, NllMean("sequence", 1, 1), torch.tensor(kl))


def padded(rows: list[list[int]], prompts: list[int]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "completion_mask": torch.tensor(
            [[0] * n + [1] * (len(row) - n) + [0] * (width - len(row)) for row, n in zip(rows, prompts, strict=True)]
        ),
    }


def columns(table: Any, *names: str) -> list[Any]:
    return [value for name in names for value in table[name].to_pylist()]


@pytest.mark.parametrize(("ours", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo(
    ours: str, theirs: str, table: Any, policy: Any, settings: dict[str, Any], tiny_model_dir: Path, own_run: Path
) -> None:
    args = trl.DPOConfig(**settings, loss_type=theirs)
    rows, tokenizer = orpo_data.load(own_run / "split", "train"), tokenizer_of(tiny_model_dir)
    trainer = trl.DPOTrainer(copy.deepcopy(policy), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    inputs = padded(columns(table, "chosen_input_ids", "rejected_input_ids"), columns(table, "prompt_len") * 2)
    inputs |= {name: torch.tensor(columns(table, name)) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    with torch.no_grad():
        expected = trainer._compute_loss(trainer.model.eval(), inputs, return_outputs=False).item()
    assert OBJECTIVES[ours].loss(our_pairs(policy, table), 0.3).mean().item() == pytest.approx(expected, abs=1e-5)


def test_kto_given_the_same_kl(
    table: Any, policy: Any, settings: dict[str, Any], tiny_model_dir: Path, own_run: Path
) -> None:
    tokenizer = tokenizer_of(tiny_model_dir)
    text = orpo_data.load(own_run / "split", "train").select_columns(["prompt", "chosen", "rejected"])
    trainer = trl.KTOTrainer(
        copy.deepcopy(policy), args=trl.KTOConfig(**settings), train_dataset=text, processing_class=tokenizer
    )
    trainer.precompute_ref_logps = True
    prompts = columns(table, "prompt_len")
    kl = padded(columns(table, "kl_input_ids") * 2, prompts * 2)
    inputs = padded(columns(table, "chosen_input_ids", "rejected_input_ids"), prompts * 2)
    inputs |= {f"KL_{name}": values for name, values in kl.items()}
    inputs["label"] = torch.tensor([True] * PAIRS + [False] * PAIRS)
    inputs["ref_logps"] = torch.tensor(columns(table, "ref_chosen_logps", "ref_rejected_logps"))
    inputs["ref_KL_logps"] = torch.tensor(columns(table, "ref_kl_logps") * 2)
    with torch.no_grad():
        expected = trainer._compute_loss(trainer.model.eval(), inputs, return_outputs=False).item()
    estimate = trainer._metrics["eval"]["kl"][-1]
    data = PairDataset(table).kl
    scorer = SequenceScorer(policy)
    batch = scorer.collate(data, [tree_of(data, [pair], ANSWERS[:1]) for pair in range(PAIRS)], "response")
    with torch.no_grad():
        sums = scorer.sums(scorer(batch), batch)
    ours = (sums.chosen * sums.chosen_tokens - batch.reference[:, 0]).mean().clamp(min=0).item()
    assert ours == pytest.approx(estimate, rel=1e-4, abs=1e-4)
    assert OBJECTIVES["kto"].loss(our_pairs(policy, table, estimate), 0.3).mean().item() == pytest.approx(
        expected, abs=1e-5
    )


def test_orpo(table: Any, policy: Any, settings: dict[str, Any], tiny_model_dir: Path, own_run: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows, tokenizer = orpo_data.load(own_run / "split", "train"), tokenizer_of(tiny_model_dir)
    args = ORPOConfig(**settings, max_length=1024)
    trainer = ORPOTrainer(copy.deepcopy(policy), args=args, train_dataset=rows, processing_class=tokenizer)
    pairs = our_pairs(policy, table)
    weighted, *_ = trainer.odds_ratio_loss(pairs.chosen, pairs.rejected)
    expected = pairs.nll - weighted
    np.testing.assert_allclose(OBJECTIVES["orpo"].loss(pairs, 0.3), expected, atol=1e-5)


def test_reward(table: Any, tiny_model_dir: Path, settings: dict[str, Any], own_run: Path) -> None:
    torch.manual_seed(0)
    model = moved(load_reward_model(tiny_model_dir, new_head=True))
    rows, tokenizer = orpo_data.load(own_run / "split", "train"), tokenizer_of(tiny_model_dir)
    args = trl.RewardConfig(**{name: value for name, value in settings.items() if name != "beta"})
    trainer = trl.RewardTrainer(copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer)
    inputs = padded(columns(table, "chosen_input_ids", "rejected_input_ids"), columns(table, "prompt_len") * 2)
    del inputs["completion_mask"]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, tokenizer.pad_token_id)
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model.eval(), inputs).item()
    batch, sums, _ = run(model, table, RewardScorer)
    pairs = pair_logps(sums, batch, NllMean("sequence", 1, 1), torch.tensor(float("nan")))
    assert OBJECTIVES["reward"].loss(pairs, 1.0).mean().item() == pytest.approx(expected, abs=1e-5)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
