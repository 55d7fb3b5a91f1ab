"""What the log of metrics says of a run."""

import math
from pathlib import Path

import pytest
from accelerate import Accelerator

from orpo_train.metrics import MetricsLog


@pytest.mark.parametrize(
    ("losses", "best", "without_gain"),
    [
        ([], None, 0),
        ([3.0, 1.0, 1.0, 2.0], 1, 2),
        ([math.nan, 2.0, 1.0, math.nan], 2, 1),
        ([-math.inf, 2.0, math.inf], 1, 1),
        ([math.nan], None, 0),
        ([math.nan, math.nan, math.inf], None, 2),
    ],
)
def test_only_a_finite_loss_is_the_best(
    losses: list[float], best: int | None, without_gain: int, tmp_path: Path
) -> None:
    lines = [{"step": step, "eval/loss": loss} for step, loss in enumerate(losses)]
    log = MetricsLog(tmp_path / "metrics.jsonl", lines, Accelerator(cpu=True))
    assert log.best() == best
    assert log.evaluations_without_gain() == without_gain
