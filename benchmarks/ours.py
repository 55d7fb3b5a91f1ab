"""This project's training: `set_up` and `optimizer_step` of the training loop, as `orpo train` runs them."""

import tempfile
import time
from pathlib import Path

from benchmarks.data import read_pairs
from benchmarks.measure import Job, Measurement, memory_with
from orpo_train.adapters import load_base
from orpo_train.batching import micro_batches
from orpo_train.config import TrainConfig
from orpo_train.model import PLAIN
from orpo_train.run import Run, set_up
from orpo_train.step import optimizer_step


def settings(job: Job) -> TrainConfig:
    """Such that the loss is TRL's: L_SFT as the token mean of prompt and chosen answer."""
    limits = {} if job.micro_batch_tokens is None else {"micro_batch_tokens": job.micro_batch_tokens}
    return TrainConfig(
        model=job.model,
        lambda_=job.weight_of_odds,
        nll_scope="prompt+response",
        nll_reduction="token",
        learning_rate=job.learning_rate,
        schedule="constant",
        warmup_steps=0,
        max_steps=job.warmup + job.steps,
        batch_size=job.batch_size,
        precision=job.dtype,
        seed=job.seed,
        **limits,
    )


def data_seconds(run: Run, first: int) -> float:
    """Seconds that making the batches of the steps from `first` on takes, done once more by itself."""
    start = time.perf_counter()
    for step in range(first, run.total):
        batch = run.order.batch(step)
        for micro in micro_batches(run.data, batch, run.sides, run.limits, packed=run.layout != PLAIN):
            run.bare_scorer.collate(run.data, micro.trees, run.config.nll_scope)
    return time.perf_counter() - start


def measure(job: Job) -> None:
    config = settings(job)
    table = read_pairs(Path(job.dataset), job.pairs)
    loaded = memory_with(load_base(config).to(job.device), job.device)  # only for this; set_up loads its own
    losses, ends = [], []
    with tempfile.TemporaryDirectory() as work:
        run = set_up(config, table, None, Path(work))
        for step in range(run.total):
            losses.append(optimizer_step(run, step)["loss"])
            ends.append(time.perf_counter())
    waited = data_seconds(run, job.warmup)
    Measurement.finish(job, ends, run.optimizer, losses=losses, loaded=loaded, data_seconds=waited)


if __name__ == "__main__":
    measure(Job.from_argument())
