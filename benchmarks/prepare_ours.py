"""This project's data part: `prepare` from raw files to shards, and `verify` of the shards it wrote last.

What the stages import on first use is imported before the clock starts, and the tokenizer is opened, as the other sides
have it and as a worker has it that tokenized before; how long that takes is told apart.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from importlib import import_module
from typing import Any

from transformers import AutoTokenizer

from benchmarks.child import Stopwatch, question
from orpo_data.errors import OrpoError
from orpo_data.process import few_full_collections
from orpo_data.unopened import UnopenedChat
from orpo_data.verification import verify
from pipelines import stages
from pipelines.preparation import prepare
from pipelines.recipe import Recipe

IMPORTED_ON_USE = ("datasets", "matplotlib.pyplot", "openlineage.client", "polars")
OPEN = "(tokenizer opened before)"
STAGES = ("ingest", "binarize", "clean", "split", "tokenize")


def timed(function: Callable[..., Any], watch: Stopwatch) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with watch:
            return function(*args, **kwargs)

    return call


def measure(recipe: str, tokenizer: str, output: str) -> dict[str, Any]:
    for module in IMPORTED_ON_USE:
        import_module(module)
    AutoTokenizer.from_pretrained(tokenizer)  # imports more
    watches = {name: Stopwatch() for name in (OPEN, *STAGES, "verify")}
    with few_full_collections, watches[OPEN]:  # as in a stage
        assert UnopenedChat(tokenizer).control_tokens
    for name in STAGES:
        setattr(stages, name, timed(getattr(stages, name), watches[name]))
    with Stopwatch() as whole:
        reports = prepare(Recipe.read(recipe), output)
        with watches["verify"]:
            verified = verify(reports[-1].path)
    if not verified.ok:
        raise OrpoError("; ".join(verified.problems))
    return {
        **asdict(whole),
        "pairs": sum(report.rows_in for report in reports if report.stage == "ingest"),
        "stages": {name: asdict(watch) for name, watch in watches.items()},
        "content_hash": reports[-1].content_hash,
    }


if __name__ == "__main__":
    print(json.dumps(measure(**question())))
