"""What a training run would take of memory, said before it starts."""

import logging
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from orpo_data.errors import OrpoError
from orpo_data.shards import read_table
from orpo_train.batching import PairDataset
from orpo_train.memory import MemoryEstimate, Sharding, estimate_memory, in_pieces
from pipelines.jobs import TrainingJob
from pipelines.training import fetch_model

log = logging.getLogger(__name__)

LAUNCHES: dict[str, Sharding] = {"ddp": "none", "zero2": "optimizer", "zero3, fsdp2": "all"}
"""The files in orpo_train/launch/, and what each cuts into pieces."""

PARTS = ("weights", "gradients", "optimizer", "activations", "head", "allocator")


def job_memory(job: TrainingJob) -> MemoryEstimate:
    """The estimate for a training job in one process; OrpoError where its data or model cannot be had."""
    base = fetch_model(job.config.model, job.config.revision)
    return estimate_memory(job.config, base, PairDataset(read_table(job.dataset, "train")))


def say_memory(job: TrainingJob) -> None:
    """Log the estimate in one line, or why there is none: a model may do what tensors without contents cannot."""
    try:
        estimate = job_memory(job)
    except (OrpoError, RuntimeError, NotImplementedError, TypeError) as error:
        log.warning("memory: no estimate: %s", str(error).strip().splitlines()[0])
        return
    parts = ", ".join(f"{name} {_size(getattr(estimate, name))}" for name in PARTS if getattr(estimate, name))
    log.info("memory: about %s a process (%s)", _size(estimate.total), parts)


def memory_json(estimate: MemoryEstimate, processes: int) -> dict[str, Any]:
    launched = {name: in_pieces(estimate, sharding, processes) for name, sharding in LAUNCHES.items()}
    return {
        "estimate": _values(estimate),
        "processes": processes,
        "launched": {name: _values(value) for name, value in launched.items()},
    }


def _values(estimate: MemoryEstimate) -> dict[str, Any]:
    return asdict(estimate) | {"allocator": estimate.allocator, "total": estimate.total}


def memory_table(estimate: MemoryEstimate, processes: int) -> Table:
    """MiB of one process, and of each of several under every launch file."""
    share = "all" if estimate.trained == estimate.parameters else f"{estimate.trained / 1e6:,.1f} M"
    counts = (
        f"{estimate.parameters / 1e6:,.1f} M parameters, {share} trained; {estimate.tokens:,} tokens a forward pass"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=counts, title_justify="left", title_style="")
    launched = {name: in_pieces(estimate, sharding, processes) for name, sharding in LAUNCHES.items()}
    columns = {"one process": estimate} | {f"{processes} x {name}": value for name, value in launched.items()}
    table.add_column("MiB, each process")
    for name in columns:
        table.add_column(name, justify="right")
    for part in (*PARTS, "total"):
        cells = (f"{getattr(value, part) / 2**20:,.0f}" for value in columns.values())
        table.add_row(part, *cells, style="bold" if part == "total" else "")
    return table


def _size(count: int) -> str:
    """
    >>> _size(3 * 2**30 // 2), _size(300 * 2**20)
    ('1.5 GiB', '300 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
