"""The memory estimate beside what training really takes: the peak of the resident set above the loaded libraries.

    python -m benchmarks.memory SmolLM2-135M=FOLDER OPT-125M=FOLDER ...

Each run has three optimizer steps in a process of its own, on the CPU; from the second one on the optimizer's state is
there. The pairs are random token ids.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_data.schema import TOKENIZED
from orpo_train.batching import PairDataset
from orpo_train.config import TrainConfig
from orpo_train.memory import estimate_memory, peak_memory

CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"precision": "fp32"},
    "checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora": {"rank": 16}},
    "reward": {"objective": "reward"},
}
LEAST = {"batch_size": 16, "micro_batch_tokens": 1024, "max_steps": 3}
VOCABULARY = 20_000
MIB = 2**20


def random_pairs(count: int = 64, longest: int = 160) -> pa.Table:
    """TOKENIZED rows without meaning."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        prompt, chosen, rejected = (
            random.integers(0, VOCABULARY, random.integers(20, longest)).tolist() for _ in range(3)
        )
        ids = {"chosen_input_ids": prompt + chosen, "rejected_input_ids": prompt + rejected}
        kept = {"prompt_turns_dropped": 0, "chosen_truncated": False, "rejected_truncated": False}
        rows.append({"id": str(number), **ids, "prompt_len": len(prompt), "source": "random", **kept})
    return pa.Table.from_pylist(rows, schema=TOKENIZED)


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """The estimate, and what a run in this process takes at its peak."""
    from orpo_train.run import set_up
    from orpo_train.step import optimizer_step

    config, table = TrainConfig.model_validate(settings), random_pairs()
    estimate = estimate_memory(config, Path(config.model), PairDataset(table))
    before = peak_memory()
    with tempfile.TemporaryDirectory() as work:
        run = set_up(config, table, None, Path(work))
        for step in range(run.total):
            optimizer_step(run, step)
    return {"estimate": estimate.total, "measured": peak_memory() - before, "layout": run.layout}


def in_a_process(settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    print("| model | run | estimate, MiB | measured, MiB | estimate / measured |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, _, folder in (argument.partition("=") for argument in sys.argv[1:]):
        for case, settings in CASES.items():
            told = in_a_process({"model": folder, **LEAST, **settings})
            ratio = told["estimate"] / told["measured"]
            sizes = f"{told['estimate'] / MIB:,.0f} | {told['measured'] / MIB:,.0f}"
            print(f"| {name} | {case} | {sizes} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
