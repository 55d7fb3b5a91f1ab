"""How good a reward model is on held-out pairs: how often it is right, and whether it knows how often."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from orpo_train.batching import Limits, PairDataset
from orpo_train.evaluate import PASS, Precision, forward_passes
from orpo_train.model import best_device, check_fits, choose_layout
from orpo_train.objectives import bradley_terry_loss
from orpo_train.reward import RewardScorer, load_reward_model

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose preference the model is about equally sure of."""

    pairs: int
    confidence: float  # mean of sigmoid(|margin|), the probability of the side the model prefers, 0.5 to 1
    accuracy: float  # share of them where that side is the chosen one


def calibration_bins(margins: Tensor, bins: int = CALIBRATION_BINS) -> list[CalibrationBin]:
    """Margins r_w - r_l [pairs] by confidence, in bins of equal width from 0.5 to 1; empty bins are left out."""
    confidence, right = margins.double().abs().sigmoid(), (margins > 0).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    groups = ((confidence[place == number], right[place == number]) for number in range(bins))
    return [CalibrationBin(len(sure), sure.mean().item(), hits.mean().item()) for sure, hits in groups if len(sure)]


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error: |accuracy - confidence|, averaged over pairs (equation 3 of arXiv 1706.04599)."""
    pairs = sum(part.pairs for part in bins)
    return sum(part.pairs * abs(part.accuracy - part.confidence) for part in bins) / pairs


def evaluate_reward(model_dir: Path, table: pa.Table, precision: Precision = "fp32") -> dict[str, Any]:
    """Figures of a reward model on TOKENIZED pairs, in the form of `orpo_train.evaluate.evaluate`.

    `after` has its figures, `calibration` the bins of its confidence, `per_pair` the margins by id; there is nothing
    `before` training, for the head is new.
    """
    data = PairDataset(table)
    chosen, rejected = _scores(model_dir, data, precision)
    margins = chosen - rejected
    bins = calibration_bins(margins)
    return {
        "model": model_dir.name,
        "kind": "reward",
        "base_model": None,
        "pairs": len(data),
        "before": None,
        "after": {
            "pair_accuracy": (margins > 0).float().mean().item(),
            "margin": margins.mean().item(),
            "loss": bradley_terry_loss(chosen, rejected).mean().item(),
            "calibration_error": calibration_error(bins),
            "score_chosen": chosen.mean().item(),
            "score_rejected": rejected.mean().item(),
        },
        "calibration": [asdict(part) for part in bins],
        "per_pair": {"id": table["id"].to_pylist(), "before_margin": None, "after_margin": margins.tolist()},
        "samples": [],
    }


def _scores(model_dir: Path, data: PairDataset, precision: Precision) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected answers, [pairs]; the model is gone from memory afterwards."""
    device = best_device()
    model = load_reward_model(model_dir).to(device)
    check_fits(model, data)
    scorer = RewardScorer(model, choose_layout(model, data, "auto", RewardScorer), precision)
    scores = torch.empty(2, len(data))
    limits = Limits(max(PASS.tokens, 2 * data.longest))
    for micro, batch, values in forward_passes(scorer, data, np.arange(len(data)), "response", limits):
        sums = scorer.sums(values, batch)
        places = [pair for tree in micro.trees for pair in tree.pairs]
        scores[:, places] = torch.stack([sums.chosen, sums.rejected]).cpu()
    return scores[0], scores[1]
