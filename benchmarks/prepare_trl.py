"""TRL's preprocessing: the three `map` calls of ORPOTrainer.__init__ with its own functions.

The trainer is one without a model, which those functions do not need (a real one is slower to hand to processes).
"""

import json
from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.orpo import ORPOTrainer

from benchmarks.child import Stopwatch, question
from orpo_data.shards import load


class Preprocessor(ORPOTrainer):
    """What `tokenize_row` reads of a trainer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        PartialState()  # its warnings ask for it
        self.processing_class = tokenizer
        self.max_length = max_length
        self.is_encoder_decoder = False


def render(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, processes: int | None) -> Dataset:
    """Pairs of messages to pairs of texts."""
    pairs = pairs.map(maybe_extract_prompt, num_proc=processes)
    return pairs.map(maybe_apply_chat_template, fn_kwargs={"processing_class": tokenizer}, num_proc=processes)


def read_pairs(folder: str) -> Dataset:
    """Every pair of a PAIRS dataset, in the form that TRL's documentation recommends."""
    disable_caching()
    disable_progress_bars()
    return load(folder).select_columns(["prompt", "chosen", "rejected"])


def measure(pairs: str, tokenizer: str, max_length: int, processes: int) -> dict[str, Any]:
    rows, words = read_pairs(pairs), AutoTokenizer.from_pretrained(tokenizer)
    several = processes if processes > 1 else None
    trainer = Preprocessor(words, max_length)
    with Stopwatch() as watch:
        found = render(rows, words, several).map(trainer.tokenize_row, num_proc=several)
    return {**asdict(watch), "pairs": len(found)}


if __name__ == "__main__":
    print(json.dumps(measure(**question())))
