"""The real pairs that the benchmarks train on, prepared by this project's own pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orpo_data.errors import UsageError
from orpo_data.shards import read_table
from pipelines import Recipe, prepare

SOURCES: dict[str, dict[str, Any]] = {
    "hh-rlhf": {"dataset": "hh-rlhf", "path": "hh_rlhf"},
    "ultrafeedback": {"dataset": "pairs", "path": "ultrafeedback_binarized", "name": "ultrafeedback"},
}
DEFAULT_DATA = Path(__file__).parents[2] / "shared" / "data"
Pairs = Literal["all", "middle"]


def tokenized_pairs(dataset: str, data: Path, tokenizer: Path, max_length: int, work: Path) -> Path:
    """Folder of the TOKENIZED pairs of one of SOURCES; made once below `work` and kept there."""
    source = SOURCES[dataset] | {"path": str((data / SOURCES[dataset]["path"]).resolve())}
    if not Path(source["path"]).is_dir():
        raise UsageError(f"--data {data}: has no {SOURCES[dataset]['path']}, the raw {dataset} pairs")
    limits = {"max_length": max_length, "max_prompt_length": max_length * 7 // 8}  # as in the ready recipes
    recipe = {
        "name": f"benchmark-{dataset}",
        "sources": [source],
        "split": {"eval_fraction": 0.02},
        "tokenize": {"tokenizer": str(tokenizer), **limits},
    }
    return prepare(Recipe.parse(recipe), work / f"{dataset}-{max_length}")[-1].path


@dataclass(frozen=True)
class PairLengths:
    """Tokens of one pair."""

    prompt: int
    chosen: int  # the answer alone
    rejected: int

    @property
    def needed(self) -> int:
        """That have to go through a model: the prompt once."""
        return self.prompt + self.chosen + self.rejected


def pair_lengths(table: pa.Table) -> list[PairLengths]:
    """Lengths of the rows of a TOKENIZED table."""
    columns = [pc.list_value_length(table[f"{side}_input_ids"]).to_pylist() for side in ("chosen", "rejected")]
    rows = zip(table["prompt_len"].to_pylist(), *columns, strict=True)
    return [PairLengths(prompt, chosen - prompt, rejected - prompt) for prompt, chosen, rejected in rows]


def read_pairs(folder: Path, which: Pairs) -> pa.Table:
    """The training rows of a TOKENIZED folder: all, or the middle half by tokens of prompt and both answers."""
    table = read_table(folder, "train")
    if which == "all":
        return table
    tokens = np.array([pair.needed for pair in pair_lengths(table)])
    low, high = np.quantile(tokens, [0.25, 0.75])
    return table.take(np.flatnonzero((low <= tokens) & (tokens <= high)))
