"""The floor: `tokenizers` encodes the bare texts, in memory, on every core, and keeps nothing.

The texts are those that TRL's chat template leaves, each once: prompt, chosen answer, rejected answer.
"""

import json
from dataclasses import asdict
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from benchmarks.child import Stopwatch, question
from benchmarks.prepare_trl import read_pairs, render

BATCH = 1_000  # texts; larger ones are no faster


def measure(pairs: str, tokenizer: str, processes: int) -> dict[str, Any]:
    words = AutoTokenizer.from_pretrained(tokenizer)
    rows = render(read_pairs(pairs), words, processes)  # before the clock starts
    texts = [text for side in ("prompt", "chosen", "rejected") for text in rows[side]]
    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    tokens = 0
    with Stopwatch() as watch:
        for first in range(0, len(texts), BATCH):
            found = encoder.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False)
            tokens += sum(map(len, found))
    return {**asdict(watch), "pairs": len(rows), "tokens": tokens}


if __name__ == "__main__":
    print(json.dumps(measure(**question())))
