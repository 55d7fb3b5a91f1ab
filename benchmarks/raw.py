"""Raw preference rows in any number: real ones over and over, every copy altered, in gzipped JSON lines."""

import gzip
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import yaml

from benchmarks.data import SOURCES
from orpo_data.errors import UsageError

Row = dict[str, Any]
Alter = Callable[[Row, int], Row]
"""A row and its running number to one unlike all others."""

SEED = 42
LABEL = re.compile(r"\n\nHuman: ?")
WORD = re.compile(r"[A-Za-z]+")
KEPT = {"Human", "Assistant"}  # words that are no text
BLOCK = 64  # words that are about as frequent as each other

EXTRA_STEPS: dict[str, Any] = {  # beside the default ones, as in the ready recipes
    "normalise": {},
    "clean": dict.fromkeys(("refusal", "boilerplate", "length_ratio", "role_label_in_text", "personal_data"), "flag"),
    "dedup": {},
    "label_noise": {},
}
STEPS: dict[str, dict[str, Any]] = {"default": {}, "all": EXTRA_STEPS}


def write_recipe(file: Path, dataset: str, raw: Path, tokenizer: Path, max_length: int, steps: str = "default") -> Path:
    """A recipe for raw rows of one of SOURCES, with one of STEPS."""
    recipe = {
        "name": f"benchmark-{dataset}",
        "sources": [SOURCES[dataset] | {"path": str(raw)}],
        "split": {"eval_fraction": 0.02},
        "tokenize": {
            "tokenizer": str(tokenizer.resolve()),
            "max_length": max_length,
            "max_prompt_length": max_length * 7 // 8,  # as in the ready recipes
        },
        **STEPS[steps],
    }
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def real_rows(dataset: str, data: Path) -> list[Row]:
    """The rows of one of SOURCES below the folder `data`."""
    files = sorted((data / SOURCES[dataset]["path"]).rglob("*.jsonl.gz"))
    if not files:
        raise UsageError(f"--data {data}: has no {SOURCES[dataset]['path']}, the raw {dataset} pairs")
    return [orjson.loads(line) for file in files for line in gzip.open(file)]


def numbered(row: Row, number: int) -> Row:
    """The row with a number before the first human turn: another prompt, hardly another text."""
    if "prompt" in row:
        return row | {"prompt": f"[{number}] {row['prompt']}"}
    sides = {
        side: LABEL.sub(lambda label: f"{label[0]}[{number}] ", row[side], count=1) for side in ("chosen", "rejected")
    }
    return row | sides


class Exchange:
    """Exchanges words for others about as frequent, in each copy otherwise: texts of the same make, no near-duplicates.

    Within a copy a word always becomes the same other one, so what two rows share they go on sharing.
    """

    def __init__(self, rows: list[Row]) -> None:
        self._rows = len(rows)
        counts = Counter(word for row in rows for text in _texts(row) for word in WORD.findall(text))
        ranked = [word for word, _ in counts.most_common() if word not in KEPT]
        self._blocks = [ranked[start : start + BLOCK] for start in range(0, len(ranked), BLOCK)]
        self._copy, self._words = 0, dict[str, str]()

    def __call__(self, row: Row, number: int) -> Row:
        if (copy := number // self._rows) != self._copy:
            self._copy, self._words = copy, self._other_words(copy)
        words = self._words
        exchanged = {key: WORD.sub(lambda word: words.get(word[0], word[0]), row[key]) for key in _text_keys(row)}
        return row | exchanged

    def _other_words(self, copy: int) -> dict[str, str]:
        chance = random.Random(SEED + copy)
        pairs = (zip(block, chance.sample(block, len(block)), strict=True) for block in self._blocks)
        return {word: other for block in pairs for word, other in block}


def _text_keys(row: Row) -> list[str]:
    return [key for key in ("prompt", "chosen", "rejected") if key in row]


def _texts(row: Row) -> list[str]:
    return [row[key] for key in _text_keys(row)]


def repeated(rows: list[Row], start: int, alter: Alter) -> Iterator[Row]:
    """The rows over and over from number `start` on; the first of each is as it was published."""
    number = start
    while True:
        row = rows[number % len(rows)]
        yield row if number < len(rows) else alter(row, number)
        number += 1


def write_rows(file: Path, rows: Iterator[Row], count: int) -> None:
    with gzip.open(file, "wb", compresslevel=6) as stream:
        for row in islice(rows, count):
            stream.write(orjson.dumps(row) + b"\n")


def raw_folder(dataset: str, data: Path, pairs: int, work: Path, *, files: int = 1, words: bool = False) -> Path:
    """A folder of `pairs` raw rows in `files` files, numbered or with words exchanged; kept below `work`."""
    folder = work / f"raw-{dataset}-{pairs}-{files}-{'words' if words else 'numbers'}"
    if folder.is_dir():
        return folder
    real = real_rows(dataset, data)
    rows = repeated(real, 0, Exchange(real) if words else numbered)
    partial = folder.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        write_rows(partial / f"part-{index:05d}.jsonl.gz", rows, pairs * (index + 1) // files - pairs * index // files)
    return partial.rename(folder)
