"""What one side of a comparison is asked for, and what it answers. Each runs in a fresh process of its own."""

import json
import resource
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import torch

from benchmarks.child import ask, question
from benchmarks.data import Pairs, read_pairs
from orpo_data.errors import OrpoError
from orpo_train.batching import BatchOrder, PairDataset


@dataclass(frozen=True)
class Job:
    """One training run of `warmup + steps` optimizer steps; the warm-up steps are not timed."""

    model: str
    dataset: str  # folder of TOKENIZED pairs
    pairs: Pairs
    dtype: Literal["fp32", "bf16"]
    batch_size: int  # pairs per optimizer step
    steps: int
    warmup: int
    max_length: int
    threads: int
    device: Literal["cpu", "cuda"]
    micro_batch_tokens: int | None  # ours: tokens per forward pass; None is the default
    peer_micro_batch: int  # the peer: pairs per forward pass
    peer_checkpointing: bool
    seed: int = 42
    learning_rate: float = 1e-6
    weight_of_odds: float = 0.1  # lambda, the peer's beta

    @classmethod
    def from_argument(cls) -> Self:
        """The job that `run_side` gave this process."""
        job = cls(**question())
        torch.set_num_threads(job.threads)
        return job

    def batches(self) -> list[pa.Table]:
        """The global batches of TOKENIZED rows that this project's trainer reads, in its order."""
        table = read_pairs(Path(self.dataset), self.pairs)
        steps = self.warmup + self.steps
        if steps * self.batch_size > len(table):
            raise OrpoError(f"{steps} steps of {self.batch_size} pairs, there are {len(table)}: lower --steps")
        order = BatchOrder(PairDataset(table), self.batch_size, self.seed)
        return [table.take(order.batch(step)) for step in range(steps)]


@dataclass(frozen=True)
class Measurement:
    """What a side saw; memory in bytes, on the CPU of the resident set, on CUDA of what is allocated."""

    step_seconds: list[float]  # of the timed steps, from the end of one optimizer step to the end of the next
    losses: list[float]  # of every step, warm-up included
    peak: int
    loaded: int  # in use after imports and with the model loaded, before anything else
    optimizer: int  # AdamW's state, counted
    data_seconds: float = 0.0  # making the batches of the timed steps; part of step_seconds

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def above(self) -> int:
        """Peak memory above weights and optimizer state: gradients, activations, logits."""
        return self.peak - self.loaded - self.optimizer

    @classmethod
    def finish(cls, job: Job, ends: list[float], optimizer: Any, **rest: Any) -> None:
        """Print the measurement of steps that ended at the times `ends`, for `run_side` to read."""
        if job.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        state = sum(value.nbytes for values in optimizer.state.values() for value in values.values())
        seconds = [end - start for start, end in pairwise(ends[job.warmup - 1 :])]
        print(json.dumps(asdict(cls(step_seconds=seconds, peak=peak, optimizer=state, **rest))))


def run_side(module: str, job: Job) -> Measurement:
    """Run a side's module in a fresh process; its last line of output is its Measurement."""
    environment = {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if job.device == "cpu" else {}
    return Measurement(**ask(module, asdict(job), environment, remedy="lower --peer-micro-batch").answer)


def memory_with(model: Any, device: str) -> int:
    """Bytes in use with `model` loaded; each weight is read once, so that none is only mapped from its file."""
    for parameter in model.parameters():
        parameter.detach().sum()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
