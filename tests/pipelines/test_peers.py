"""The cleaned pairs go into TRL's trainers as they are: nothing but `load` between them."""

from pathlib import Path

import pytest

import orpo_data


@pytest.fixture
def pairs(own_run: Path):
    """From a copy: `datasets` caches what the trainers map in the folder that it reads."""
    return orpo_data.load(own_run / "clean", split="train")


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, object]:
    """One step on the CPU, with all columns left where they are."""
    return {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "max_length": 1024,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def loss_of_one_step(trainer) -> float:
    return float(trainer.train().training_loss)


def model_and_tokenizer(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_dpo(pairs, quick, tiny_model_dir):
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = model_and_tokenizer(tiny_model_dir)
    trainer = DPOTrainer(model, args=DPOConfig(**quick), train_dataset=pairs, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(pairs)
    # the policy still equals its reference: log 2
    assert loss_of_one_step(trainer) == pytest.approx(0.6931, abs=1e-3)


def test_orpo(pairs, quick, tiny_model_dir):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, tokenizer = model_and_tokenizer(tiny_model_dir)
    trainer = ORPOTrainer(model, args=ORPOConfig(**quick), train_dataset=pairs, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(pairs)
    assert 0 < loss_of_one_step(trainer) < 20


def test_reward(pairs, quick, tiny_model_dir):
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    _, tokenizer = model_and_tokenizer(tiny_model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    trainer = RewardTrainer(model, args=RewardConfig(**quick), train_dataset=pairs, processing_class=tokenizer)
    assert 0 < loss_of_one_step(trainer) < 10
