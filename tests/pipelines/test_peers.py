"""Our datasets in other people's code, as they are: nothing but `load`, `scan` or a view between them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import orpo_data
from orpo_train.objectives import orpo_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"  # TRL still says it so
)


@pytest.fixture
def pairs(own_run: Path) -> Callable[[str], Any]:
    """A stage's rows, from a copy: `datasets` caches what the trainers map in the folder that it reads."""
    return lambda stage: orpo_data.load(own_run / stage, split="train")


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, Any]:
    """One step on the CPU."""
    return {
        "output_dir": str(tmp_path / "trainer"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def loss_of_one_step(trainer: Any) -> float:
    return float(trainer.train().training_loss)


def model_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def response_logps(model: Any, batch: dict[str, Any], side: str) -> Any:
    """Mean log-probability of the tokens that have a label, shape [batch]: as anyone's loop would write it."""
    logits = model(input_ids=batch[f"{side}_input_ids"], attention_mask=batch[f"{side}_attention_mask"]).logits
    labels = batch[f"{side}_labels"][:, 1:]
    read = labels != -100
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * read).sum(1) / read.sum(1)


# --- TRL: text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["binarize", "split"])
def test_trl_dpo(pairs: Callable[[str], Any], quick: dict[str, Any], tiny_model_dir: Path, stage: str) -> None:
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = model_and_tokenizer(tiny_model_dir)
    rows = pairs(stage)
    trainer = DPOTrainer(model, args=DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(rows)
    # the policy still equals its reference: log 2
    assert loss_of_one_step(trainer) == pytest.approx(0.6931, abs=1e-3)


def test_trl_orpo(pairs: Callable[[str], Any], quick: dict[str, Any], tiny_model_dir: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, tokenizer = model_and_tokenizer(tiny_model_dir)
    rows = pairs("split")
    args = ORPOConfig(**quick, max_length=1024)
    trainer = ORPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(rows)
    assert 0 < loss_of_one_step(trainer) < 20


@pytest.fixture
def reward_model(tiny_model_dir: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)


@pytest.mark.parametrize("rows", ["text", "token ids"])
def test_trl_reward(own_run: Path, quick: dict[str, Any], tiny_model_dir: Path, reward_model: Any, rows: str) -> None:
    from trl import RewardConfig, RewardTrainer

    _, tokenizer = model_and_tokenizer(tiny_model_dir)
    text = orpo_data.load(own_run / "split")
    dataset = text if rows == "text" else orpo_data.view(own_run / "tokenize", "trl-reward")
    trainer = RewardTrainer(reward_model, args=RewardConfig(**quick), train_dataset=dataset, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(dataset)
    assert 0 < loss_of_one_step(trainer) < 10


# --- transformers and torch: token ids ------------------------------------------------------------------------------


def test_transformers_trainer_with_our_collator_and_loss(
    prepared: Path, quick: dict[str, Any], tiny_model_dir: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    class OrpoTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            chosen, rejected = (response_logps(model, inputs, side) for side in ("chosen", "rejected"))
            return orpo_loss(-chosen, chosen, rejected, lambda_=0.1).loss.mean()

    model, tokenizer = model_and_tokenizer(tiny_model_dir)
    trainer = OrpoTrainer(
        model,
        args=TrainingArguments(**quick, remove_unused_columns=False),
        train_dataset=orpo_data.load(prepared / "tokenize"),
        data_collator=orpo_data.PairCollator(pad_token_id=tokenizer.pad_token_id),
    )
    assert 0 < loss_of_one_step(trainer) < 20


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plain_data_loader(prepared: Path, workers: int) -> None:
    from torch.utils.data import DataLoader

    rows = orpo_data.load(prepared / "tokenize")
    collate = orpo_data.PairCollator(pad_token_id=0)
    # a forked worker would share the locks of the threads that earlier tests left behind
    context = "spawn" if workers else None
    loader = DataLoader(rows, batch_size=4, collate_fn=collate, num_workers=workers, multiprocessing_context=context)
    batches = list(loader)
    assert sum(len(batch["chosen_input_ids"]) for batch in batches) == len(rows)
    first = rows[0]["chosen_input_ids"]
    assert batches[0]["chosen_input_ids"][0, : len(first)].tolist() == first


# --- datasets and polars ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["split", "tokenize"])
def test_datasets_streams_the_shards(prepared: Path, tmp_path: Path, stage: str) -> None:
    from datasets import load_dataset

    files = {split: str(prepared / stage / split / "*.arrow") for split in ("train", "eval")}
    streamed = load_dataset("arrow", data_files=files, streaming=True, cache_dir=str(tmp_path))
    for split, rows in streamed.items():
        assert list(rows) == orpo_data.load(prepared / stage, split=split).to_list()


def test_polars_answers_questions_of_the_rows(prepared: Path) -> None:
    words = pl.col("chosen").list.first().struct.field("content").str.split(" ").list.len()
    answer = orpo_data.scan(prepared / "clean").group_by("source").agg(pairs=pl.len(), words=words.mean()).collect()
    rows = orpo_data.load(prepared / "clean").to_list()
    for source, pairs, mean in answer.iter_rows():
        lengths = [len(row["chosen"][0]["content"].split(" ")) for row in rows if row["source"] == source]
        assert (pairs, pytest.approx(mean)) == (len(lengths), sum(lengths) / len(lengths))
    assert answer["pairs"].sum() == len(rows)
