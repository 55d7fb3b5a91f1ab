"""The memory estimate beside what a training run really takes, each run in a process of its own on the CPU.

python -m benchmarks.memory [--models NAME=FOLDER ...]
"""

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.data import read_pairs
from orpo_train.batching import PairDataset
from orpo_train.config import TrainConfig
from orpo_train.memory import estimate_memory, peak_memory

STEPS = 3  # from the second one on the optimizer's state is there


def measure(settings: dict[str, object], dataset: Path) -> dict[str, object]:
    """The estimate, and the peak of the resident set above what the libraries took, of a few steps."""
    from orpo_train.run import set_up
    from orpo_train.step import optimizer_step

    config = TrainConfig.model_validate(settings)
    table = read_pairs(dataset, "all")
    estimate = estimate_memory(config, Path(config.model), PairDataset(table))
    before = peak_memory()
    with tempfile.TemporaryDirectory() as work:
        run = set_up(config, table, None, Path(work))
        for step in range(run.total):
            optimizer_step(run, step)
    return {
        "estimate": estimate.total,
        "measured": peak_memory() - before,
        "parts": vars(estimate),
        "layout": run.layout,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        asked = json.loads(sys.argv[2])
        print(json.dumps(measure(asked["settings"], Path(asked["dataset"]))))
        return


if __name__ == "__main__":
    main()
