"""How a model judges held-out pairs, and what it answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from orpo_data.errors import OrpoError
from orpo_data.schema import ANSWERS
from orpo_train.batching import FloatArray, IntArray, Limits, MicroBatch, PairDataset, micro_batches
from orpo_train.config import Sampling
from orpo_train.generate import end_tokens, generate
from orpo_train.layout import Batch, NllScope
from orpo_train.model import (
    PLAIN,
    PairSums,
    Scorer,
    SequenceScorer,
    best_device,
    check_fits,
    choose_layout,
    evaluating,
    load_model,
)
from orpo_train.objectives import log_odds

Precision = Literal["fp32", "bf16"]
PAIRS_PER_PLAN = 512
PASS = Limits(tokens=4096)


@dataclass(frozen=True)
class PairScores:
    """One value for each pair of `pairs`."""

    pairs: IntArray  # which pairs of the data, ascending
    chosen: FloatArray  # mean log-probability of the response tokens
    rejected: FloatArray
    nll_sum: FloatArray
    nll_tokens: FloatArray
    log_odds_ratio: FloatArray  # log odds of chosen minus log odds of rejected


def forward_passes(
    scorer: Scorer,
    data: PairDataset,
    pairs: IntArray,
    scope: NllScope,
    limits: Limits = PASS,
    rank: int = 0,
    world: int = 1,
    sides: Sequence[str] = ANSWERS,
) -> Iterator[tuple[MicroBatch, Batch, Tensor]]:
    """This process' share of some pairs, pass by pass without gradient: what ran, and the values the scorer read.

    All processes do equally many passes; one of weight 0 only keeps step with the others.
    """
    device = next(scorer.parameters()).device
    with evaluating(scorer):
        for start in range(0, len(pairs), PAIRS_PER_PLAN):
            plan = pairs[start : start + PAIRS_PER_PLAN]
            passes = micro_batches(data, plan, sides, limits, packed=scorer.layout != PLAIN, multiple=world)
            for micro in passes[rank::world]:
                batch = scorer.collate(data, micro.trees, scope).to(device)
                with torch.no_grad():
                    values = scorer(batch)
                yield micro, batch, values


def score_pairs(
    scorer: SequenceScorer,
    data: PairDataset,
    pairs: IntArray,
    scope: NllScope,
    limits: Limits = PASS,
    rank: int = 0,
    world: int = 1,
) -> PairScores:
    """Score this process' share of some pairs without gradient; all processes do equally many forward passes."""
    scored: list[int] = []
    columns: list[Tensor] = []
    for micro, batch, values in forward_passes(scorer, data, pairs, scope, limits, rank, world):
        if micro.weight:
            scored += [pair for tree in micro.trees for pair in tree.pairs]
            columns.append(_columns(scorer.sums(values, batch)).cpu())
    order = np.argsort(np.array(scored, np.int64), kind="stable")
    table: FloatArray = torch.cat(columns).numpy() if columns else np.empty((0, 5), np.float32)
    return PairScores(np.array(scored, np.int64)[order], *table[order].T)


def _columns(sums: PairSums) -> Tensor:
    """[pairs, 5] in the order of PairScores."""
    ratio = log_odds(sums.chosen) - log_odds(sums.rejected)
    return torch.stack([sums.chosen, sums.rejected, sums.nll_sum, sums.nll_tokens, ratio], dim=1).float()


def summarise(scores: PairScores) -> dict[str, float]:
    """Means over the pairs; `pair_accuracy` is the share of pairs whose chosen answer is the likelier one."""
    margins = scores.chosen - scores.rejected
    return {
        "pair_accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
        "log_odds_ratio": float(scores.log_odds_ratio.mean()),
        "nll": float((scores.nll_sum / scores.nll_tokens).mean()),
        "logps_chosen": float(scores.chosen.mean()),
        "logps_rejected": float(scores.rejected.mean()),
    }


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """The likeliest answers to prompts of token ids, as text."""
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0)
    answers = generate(model, prompts, sampling, end_tokens(model, tokenizer))
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def evaluate(
    model_dir: Path,
    base_model: Path | None,
    table: pa.Table,
    *,
    nll_scope: NllScope = "response",
    precision: Precision = "fp32",
    samples: int = 4,
    max_new_tokens: int = 128,
) -> dict[str, Any]:
    """Figures of a model on TOKENIZED pairs, beside those of the model it was trained from.

    Returns plain JSON values: `before` and `after` (see `summarise`), `per_pair` log odds ratios by
    id (and log probability ratios after training), and `samples`
    with the answers of both models to the first prompts.
    """
    data = PairDataset(table)
    prompts = [data.ids(pair, "chosen")[: data.prompt_len(pair)].tolist() for pair in range(min(samples, len(data)))]
    tokenizer = load_tokenizer(model_dir)  # the data's; a base model may lie somewhere without one
    after, answers_after = _judge(model_dir, tokenizer, data, prompts, nll_scope, precision, max_new_tokens)
    before, answers_before = (
        _judge(base_model, tokenizer, data, prompts, nll_scope, precision, max_new_tokens)
        if base_model
        else (None, None)
    )
    return {
        "model": model_dir.name,
        "base_model": base_model.name if base_model else None,
        "pairs": len(data),
        "before": summarise(before) if before else None,
        "after": summarise(after),
        "per_pair": {
            "id": table["id"].to_pylist(),
            "before_margin": before.log_odds_ratio.tolist() if before else None,
            "after_margin": after.log_odds_ratio.tolist(),
            "after_probability_ratio": (after.chosen - after.rejected).tolist(),
        },
        "samples": [
            {"id": table["id"][i].as_py(), "before": answers_before[i] if answers_before else None, "after": answer}
            for i, answer in enumerate(answers_after)
        ],
    }


def _judge(
    folder: Path,
    tokenizer: Any,
    data: PairDataset,
    prompts: list[list[int]],
    scope: NllScope,
    precision: Precision,
    new_tokens: int,
) -> tuple[PairScores, list[str]]:
    """Scores and sample answers of the model in `folder`; the model is gone from memory afterwards."""
    device = best_device()
    model = load_model(folder).to(device)
    check_fits(model, data)
    layout = choose_layout(model, data, "auto")
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        answers = greedy_answers(model, tokenizer, prompts, new_tokens)
    limits = Limits(max(PASS.tokens, 2 * data.longest))
    scores = score_pairs(SequenceScorer(model, layout, precision), data, np.arange(len(data)), scope, limits)
    return scores, answers


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local model folder; OrpoError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise OrpoError(f"{folder}: has no tokenizer: {str(error).strip().splitlines()[0]}") from None
