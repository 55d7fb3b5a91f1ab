"""The figures of a step, under the names TRL's users know, and the file they go to."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_data.places import write_whole
from orpo_train.objectives import Objective, PairLogps, log_odds

CHOSEN_METRICS = ("loss", "nll_loss", "logps/chosen")
"""What can be said where only the chosen answers ran."""

REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")

METRICS = (*CHOSEN_METRICS, "log_odds_ratio", "log_odds_chosen", "logps/rejected", *REWARD_METRICS)


COLUMNS = (*METRICS, "kl")
"""Everything that is summed up; the estimate of the KL to the reference is of objectives that use it."""


def names_of(objective: Objective, *, both_sides: bool) -> tuple[str, ...]:
    """The figures that an objective has, where rejected answers ran or did not; a scalar head knows no tokens."""
    if objective.scalar_head:
        return "loss", *REWARD_METRICS
    if objective.needs_kl:
        return COLUMNS
    return METRICS if both_sides else CHOSEN_METRICS


def metric_sums(losses: Tensor, pairs: PairLogps, objective: Objective, weight: float) -> Tensor:
    """Sums over the pairs in the order of COLUMNS; a reward is the objective's own, times its weight."""
    odds_ratio = log_odds(pairs.chosen) - log_odds(pairs.rejected)
    chosen, rejected = objective.rewards(pairs)
    columns = (
        losses,
        pairs.nll,
        pairs.chosen,
        logsigmoid(odds_ratio),
        odds_ratio,
        pairs.rejected,
        weight * chosen,
        weight * rejected,
        (chosen > rejected).float(),
        weight * (chosen - rejected),
        pairs.kl,
    )
    return torch.stack([column.detach().float().sum() for column in columns])


def named_means(sums: Tensor, pairs: int, names: Sequence[str]) -> dict[str, float]:
    """Of the sums of COLUMNS over `pairs`, the means of the figures in `names`."""
    values = dict(zip(COLUMNS, (sums / pairs).tolist(), strict=True))
    return {name: values[name] for name in names}


class MetricsLog:
    """metrics.jsonl and the trackers; after a resume the file goes on from the checkpoint's step."""

    def __init__(self, path: Path, lines: list[dict[str, Any]], accelerator: Accelerator) -> None:
        """`lines` are those of the checkpoint that the run goes on from."""
        self._path, self._accelerator = path, accelerator
        self.lines = lines
        if accelerator.is_main_process:
            write_whole(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        line = {"step": step, **metrics}
        self.lines.append(line)
        if self._accelerator.is_main_process:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._accelerator.log(metrics, step=step)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "eval/loss" in line]

    @property
    def training(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "loss" in line]

    def best(self, until: int | None = None) -> int | None:
        """The step with the lowest evaluation loss, the first of equals; None before any that is finite."""
        lines = [
            line
            for line in self.evaluations
            if math.isfinite(line["eval/loss"]) and (until is None or line["step"] <= until)
        ]
        return min(lines, key=lambda line: line["eval/loss"])["step"] if lines else None

    def evaluations_without_gain(self) -> int:
        """Evaluations since the best one; since the first where none is finite."""
        best, evaluations = self.best(), self.evaluations
        return sum(line["step"] > best for line in evaluations) if best is not None else len(evaluations[1:])

    def last(self, step: int | None = None) -> dict[str, float]:
        """The newest training line and evaluation in one, those up to `step` if given."""
        newest = []
        for kind in (self.training, self.evaluations):
            newest += [line for line in kind if step is None or line["step"] <= step][-1:]
        return {name: value for line in newest for name, value in line.items() if name != "step"}
