"""A policy's own answers to held-out prompts, and what a reward model thinks of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from orpo_train.batching import Limits, PairDataset
from orpo_train.config import Sampling
from orpo_train.evaluate import PASS, Precision, load_tokenizer, score_pairs
from orpo_train.generate import end_tokens, generate
from orpo_train.model import SequenceScorer, check_fits, choose_layout, load_model
from orpo_train.reward import Judge

TEXTS = 3
"""Answers that are kept as text, of the first draw."""


def judged_answers(
    model_dir: Path, judge_dir: Path, table: pa.Table, sampling: Sampling, draws: int, precision: Precision
) -> dict[str, Any]:
    """Answers to the prompts of TOKENIZED pairs, `draws` to each, with their rewards; and the pairs' own figures.

    Draw number n has the seed `sampling.seed` + n. The policy is gone from memory when the judge comes. Returns plain
    JSON values: `draws`, each with `seed`, and for each prompt `rewards`, `tokens` and `ended` (whether the answer came
    to its end); `pair_logps`, mean log-probabilities of the pairs' chosen and rejected answers; `texts`.
    """
    data = PairDataset(table)
    prompts = [data.ids(pair, "chosen")[: data.prompt_len(pair)].tolist() for pair in range(len(data))]
    tokenizer = load_tokenizer(model_dir)
    drawn, ends, pairs = _answer(model_dir, tokenizer, data, prompts, sampling, draws, precision)
    device = _device()
    judge = Judge.load(judge_dir, tokenizer, device)
    told = []
    for number, answers in enumerate(drawn):
        sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            rewards = judge(sequences).tolist()
        told.append(
            {
                "seed": sampling.seed + number,
                "rewards": rewards,
                "tokens": [len(answer) for answer in answers],
                "ended": [answer[-1] in ends for answer in answers],
            }
        )
    texts = tokenizer.batch_decode(drawn[0][:TEXTS], skip_special_tokens=True)
    return {"ids": table["id"].to_pylist(), "draws": told, "pair_logps": pairs, "texts": texts}


def _answer(
    folder: Path,
    tokenizer: Any,
    data: PairDataset,
    prompts: list[list[int]],
    sampling: Sampling,
    draws: int,
    precision: Precision,
) -> tuple[list[list[list[int]]], set[int], dict[str, list[float]]]:
    """Answers [draws][prompts] as ids, the ids that end one, and the pairs' log-probabilities."""
    device = _device()
    model = load_model(folder).to(device)
    check_fits(model, data)
    layout = choose_layout(model, data, "auto")
    ends = end_tokens(model, tokenizer)
    seeds = [sampling.model_copy(update={"seed": sampling.seed + number}) for number in range(draws)]
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        drawn = [generate(model, prompts, seeded, ends) for seeded in seeds]
    limits = Limits(max(PASS.tokens, 2 * data.longest))
    scores = score_pairs(SequenceScorer(model, layout, precision), data, np.arange(len(data)), "response", limits)
    return drawn, ends, {"chosen": scores.chosen.tolist(), "rejected": scores.rejected.tolist()}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
