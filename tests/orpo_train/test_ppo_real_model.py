"""PPO on a real language model: a reward model learns what is liked, and the answers come to be liked more."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from orpo_data.schema import TOKENIZED
from orpo_train.config import TrainConfig
from orpo_train.loop import train

THINGS = "apple river violin castle doctor winter pencil tiger market garden engine mirror island candle bridge teacher"


@pytest.fixture
def smollm2() -> Path:
    folder = Path(os.environ.get("ORPO_CACHE", "")) / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.skip("SmolLM2-135M-Instruct is not in ORPO_CACHE; `orpo quickstart` puts it there")
    return folder


def pairs(tokenizer: Any) -> pa.Table:
    """Yes is liked and no is not. The model itself says no three times as often, and mostly something else."""
    rows = []
    for thing in THINGS.split():
        question = [{"role": "user", "content": f"Is a {thing} heavy? Answer yes or no."}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        yes, no = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Yes", "No"))
        rows.append(
            {
                "id": thing,
                "chosen_input_ids": prompt + yes,
                "rejected_input_ids": prompt + no,
                "prompt_len": len(prompt),
                "source": "test",
                "prompt_turns_dropped": 0,
                "chosen_truncated": True,
                "rejected_truncated": True,
            }
        )
    return pa.Table.from_pylist(rows, schema=TOKENIZED)


@pytest.mark.slow
def test_answers_score_higher_after_a_few_steps(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    table = pairs(tokenizer)
    settings: dict[str, Any] = {"model": str(smollm2), "precision": "fp32", "batch_size": 8, "epochs": 9}
    settings |= {"schedule": "constant", "warmup_steps": 0}
    for name in ("judge", "policy"):
        tokenizer.save_pretrained(tmp_path / name)
    judge = TrainConfig(**settings, objective="reward", learning_rate=3e-5, max_steps=3)
    assert train(judge, table, None, tmp_path / "judge", "f" * 64).metrics["rewards/accuracies"] == 1
    ppo = {"reward_model": str(tmp_path / "judge"), "max_new_tokens": 1, "kl": 0.02, "epochs": 2, "minibatches": 2}
    policy = TrainConfig(**settings | {"batch_size": 16}, objective="ppo", learning_rate=3e-5, max_steps=4, ppo=ppo)
    train(policy, table, None, tmp_path / "policy", "f" * 64)
    lines = [json.loads(line) for line in (tmp_path / "policy" / "metrics.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines]
    print(
        [{name: round(line[name], 3) for name in ("score", "kl", "answer_tokens", "answers_ended")} for line in lines]
    )
    assert torch.tensor(scores).isfinite().all()
    assert np.mean(scores[-2:]) > scores[0] + 1
