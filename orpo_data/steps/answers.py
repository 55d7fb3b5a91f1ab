"""Answers as they compare for label noise, case, spacing and punctuation set aside: their hashes, and words in common.

`rules.folding.folded` is the definition; for most texts the same comes from the bytes of the whole column at once.
"""

import unicodedata

import numpy as np
import polars as pl
from numpy.typing import NDArray

from orpo_data.hashing import number_hashes
from orpo_data.steps.folds import TAME
from orpo_data.steps.rules.folding import folded
from orpo_data.steps.tokens import FINAL, Hashes, Rules, Tokens, ascii_table, character_kinds, distinct

KEPT = "-+*/%&@#\\"  # punctuation that decides what a formula or a file name says
# beyond ASCII: punctuation and spaces
MARKS = (
    *((0xA0, 0xA1), (0xA7, 0xA7), (0xAB, 0xAB), (0xB6, 0xB7), (0xBB, 0xBB), (0xBF, 0xBF), (0x2010, 0x2016)),
    *((0x2018, 0x2029), (0x202F, 0x203D), (0x203F, 0x2043), (0x2045, 0x2051), (0x2053, 0x205E), (0x2308, 0x230B)),
    *((0x2768, 0x2775), (0x3000, 0x3003), (0x3008, 0x3011), (0x3014, 0x301F), (0xFF01, 0xFF01), (0xFF0C, 0xFF0C)),
    *((0xFF1A, 0xFF1B), (0xFF1F, 0xFF1F)),
)
SPECIAL = "-*/%&@#\\ "  # nothing that `folded` takes for content: a text of these alone stands for itself
TEXT = np.uint64(40)  # bits of a word's hash, below the number of its text


def _separates(letter: str) -> bool:
    return letter not in KEPT and (letter.isspace() or unicodedata.category(letter)[0] in "PC")


FOLDED = Rules(ascii_table(_separates), character_kinds(MARKS, TAME), lambda text: "")  # other texts are special too


def hashes_and_words(texts: pl.Series) -> tuple[Hashes, Hashes]:
    """A hash of each folded text; and of each of its distinct words one, below the number of the text."""
    tokens = Tokens.of(texts, FOLDED)
    contents = tokens.joined()
    special = (contents.str.strip_chars(SPECIAL) == "").to_numpy()
    number = np.repeat(np.arange(len(texts)), tokens.counts)
    words = _numbered(number, tokens.hashes())[~special[number]]
    rows = np.flatnonzero(special)
    if len(rows):
        exact = texts.gather(rows).to_frame("text").select(folded(pl.col("text"))).to_series()
        tokens = Tokens.of(exact, FINAL)
        contents = contents.scatter(rows, exact)
        words = np.concatenate([words, _numbered(np.repeat(rows, tokens.counts), tokens.hashes())])
    return number_hashes(contents), distinct(words)


def alike(some: Hashes, others: Hashes, rows: int) -> NDArray[np.float64]:
    """The share of words that two texts have in common, for each row: 1 where neither has any; both are `distinct`."""
    both = np.sort(np.concatenate([some, others]), kind="stable")  # merges the two
    shared = np.bincount((both[1:][both[1:] == both[:-1]] >> TEXT).astype(np.int64), minlength=rows)
    either = np.bincount((both >> TEXT).astype(np.int64), minlength=rows) - shared
    return np.where(either > 0, shared / np.maximum(either, 1), 1.0)


def _numbered(texts: NDArray[np.int64], hashes: Hashes) -> Hashes:
    return texts.astype(np.uint64) << TEXT | hashes >> (np.uint64(64) - TEXT)
