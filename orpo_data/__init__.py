"""What a preference dataset is, and each thing done to it.

>>> import orpo_data
>>> orpo_data.load("runs/hh/tokenize", split="train")   # datasets.Dataset, memory-mapped
>>> orpo_data.scan("runs/hh/clean")                     # polars.LazyFrame over the same bytes
>>> orpo_data.verify("runs/hh/clean").ok
>>> orpo_data.lineage("runs/hh/clean", row="3f9a")      # a row's raw origin and every decision made on it
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_data.history import lineage
    from orpo_data.shards import load, scan
    from orpo_data.verification import verify

__all__ = ["lineage", "load", "scan", "verify"]

# imported on first use, so that the command line answers without loading Arrow
_HOMES = {
    "lineage": "orpo_data.history",
    "load": "orpo_data.shards",
    "scan": "orpo_data.shards",
    "verify": "orpo_data.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orpo_data' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
