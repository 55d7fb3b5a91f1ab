"""What a preference dataset is, and each thing done to it.

>>> import orpo_data
>>> orpo_data.load("runs/hh/tokenize", split="train")   # datasets.Dataset, memory-mapped
>>> orpo_data.scan("runs/hh/clean")                     # polars.LazyFrame over the same bytes
>>> orpo_data.stream("s3://bucket/hh/tokenize")         # datasets.IterableDataset, shard by shard from object storage
>>> orpo_data.view("runs/hh/clean", "llama-factory")    # datasets.Dataset under another trainer's columns
>>> orpo_data.PairCollator(pad_token_id=0)              # rows of a tokenized dataset to padded torch tensors
>>> orpo_data.verify("runs/hh/clean").ok
>>> orpo_data.lineage("runs/hh/clean", row="3f9a")      # a row's raw origin and every decision made on it
>>> orpo_data.push("runs/hh/split", "me/hh-clean")      # to the hub, with parquet and Croissant metadata
>>> orpo_data.diff("monday/clean", "tuesday/clean")     # rows in, out and changed, why, and how distributions moved
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_data.collator import PairCollator
    from orpo_data.comparison import diff
    from orpo_data.history import lineage
    from orpo_data.publish import push
    from orpo_data.shards import load, scan, stream
    from orpo_data.verification import verify
    from orpo_data.views import view

__all__ = ["PairCollator", "diff", "lineage", "load", "push", "scan", "stream", "verify", "view"]

# imported on first use, so that the command line answers without loading Arrow
_HOMES = {
    "PairCollator": "orpo_data.collator",
    "diff": "orpo_data.comparison",
    "lineage": "orpo_data.history",
    "load": "orpo_data.shards",
    "push": "orpo_data.publish",
    "scan": "orpo_data.shards",
    "stream": "orpo_data.shards",
    "verify": "orpo_data.verification",
    "view": "orpo_data.views",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orpo_data' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
