"""Sketches of texts and the search for those that are alike: MinHash-LSH finds candidates, exact Jaccard judges them.

A sketch lies in three columns, so that all sketches of a dataset can be searched without loading them:
shingles  the hashes of the runs of words, distinct and sorted, part after part
sizes     how many of them each part has
bands     one hash of a few MinHash values each: two texts are candidates if they share one

Whether two texts are candidates, and how similar they are, follows from the two alone. The MinHash values are computed
here and by no package: they are kept from run to run, so no release may change them, and a column is hashed at once.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from orpo_data.hashing import number_hashes
from orpo_data.steps.near import SHINGLE_WORDS
from orpo_data.steps.tokens import Hashes, Places, Tokens, distinct, mixed

LEAST_PART = 0.25  # similarity that every part of two near-duplicates must have
MISSED = 1e-3  # at most this share of the pairs that are exactly as similar as the threshold is overlooked
MOST_VALUES = 144  # MinHash values of a text
BLOCK = 100_000  # shingles at once: they and their products stay in the processor's cache

ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)  # one a word of a run
SHORT = np.uint64(0xD6E8FEB86659FD93)  # sets runs of fewer than three words apart
HALF = np.uint64(32)
NONE = np.uint32(0xFFFFFFFF)  # MinHash of nothing
MULTIPLIERS = (mixed(np.arange(1, MOST_VALUES + 1, dtype=np.uint64)) >> HALF).astype(np.uint32) | np.uint32(1)
TAGS = (mixed(np.arange(1, 9, dtype=np.uint64) << HALF) >> HALF).astype(np.uint32)  # one a part

Rows = NDArray[np.int64]


def bands_of(threshold: float) -> tuple[int, int]:
    """Bands, and values in each: as many values as can be (so the fewest false candidates), and as few bands.

    A pair of similarity s shares a band of r values with probability s^r, so all b bands miss it with (1 - s^r)^b.
    """
    if threshold == 1:
        return 1, 8
    needed = {r: math.ceil(math.log(MISSED) / math.log1p(-(threshold**r))) for r in range(1, 9)}
    values = max(r for r, bands in needed.items() if r * bands <= MOST_VALUES)
    return needed[values], values


def sketches(parts: Sequence[pl.Series], tokens: Sequence[Tokens], threshold: float) -> dict[str, pa.Array]:
    """The columns of a sketch for each row of texts, a text having several parts, e.g. prompt and answers.

    A run of words counts for its part alone: a pair and the same with its answers exchanged are not alike. `tokens` are
    the `word_tokens` of the parts.
    """
    rows, many = len(parts[0]), len(parts)
    keys = distinct(np.concatenate([_keys(*both, i, many) for i, both in enumerate(zip(parts, tokens, strict=True))]))
    slots = (keys >> HALF).astype(np.int64)  # row * many + part
    hashes = keys.astype(np.uint32)
    sizes = np.bincount(slots, minlength=rows * many)
    ends = np.concatenate([[0], np.cumsum(sizes.reshape(rows, many).sum(1))])
    bands, values = bands_of(threshold)
    found = _bands(hashes ^ TAGS[slots % many], ends, bands, values)
    return {
        "shingles": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(hashes)),
        "sizes": pa.FixedSizeListArray.from_arrays(pa.array(sizes, pa.uint32()), many),
        "bands": pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), bands),
    }


def _keys(texts: pl.Series, tokens: Tokens, part: int, many: int) -> Hashes:
    """Slot (row * many + part) and 32-bit hash of every run of words in one: collisions are far below what counts."""
    words, counts = tokens.hashes(), tokens.counts
    text = np.repeat(np.arange(len(counts)), counts)
    weighted = words * ODD[0]
    weighted[:-1] += words[1:] * ODD[1]
    weighted[:-2] += words[2:] * ODD[2]
    whole = np.zeros(len(words), bool)
    whole[: 1 - SHINGLE_WORDS] = text[: 1 - SHINGLE_WORDS] == text[SHINGLE_WORDS - 1 :]
    begins = np.cumsum(counts) - counts
    few = np.flatnonzero((counts > 0) & (counts < SHINGLE_WORDS))
    first, last = words[begins[few]], words[begins[few] + counts[few] - 1]
    short = first * ODD[0] + last * ODD[1] + counts[few].astype(np.uint64) * SHORT
    unworded = np.flatnonzero((counts == 0) & (texts != "").to_numpy())
    signs = np.array([row for row in unworded.tolist() if texts[row].strip()], np.int64)
    rows = np.concatenate([text[whole], few, signs]).astype(np.uint64)
    hashes = mixed(np.concatenate([weighted[whole], short, number_hashes(texts.gather(signs))])) >> HALF
    return (rows * np.uint64(many) + np.uint64(part)) << HALF | hashes


def _bands(values: NDArray[np.uint32], ends: Places, bands: int, rows: int) -> NDArray[np.uint32]:
    """The bands of each text, whose shingles are values[ends[i] : ends[i + 1]].

    A MinHash value is the least of h * a mod 2^32 over a text's hashes h, with its own odd a: h is as good as random.
    """
    found = np.full((bands * rows, len(ends) - 1), NONE)
    some = np.flatnonzero(np.diff(ends))
    for texts in _blocks(some, ends):
        start, end = ends[texts[0]], ends[texts[-1] + 1]
        block, starts = values[start:end], ends[texts] - start
        product, least = np.empty_like(block), np.empty((bands * rows, len(texts)), np.uint32)
        for factor, own in zip(MULTIPLIERS, least, strict=False):  # reduceat with `out=` keeps the interpreter's lock
            own[:] = np.minimum.reduceat(np.multiply(block, factor, out=product), starts)
        found[:, texts] = least
    mixture = np.zeros((bands, len(ends) - 1), np.uint64)
    for row in found.reshape(bands, rows, -1).transpose(1, 0, 2):
        mixture = mixed(mixture * ODD[0] ^ row)
    return (mixture >> HALF).astype(np.uint32).T


def _blocks(texts: Rows, ends: Places) -> Iterator[Rows]:
    """Texts in runs of about `BLOCK` shingles."""
    number = (ends[texts] // BLOCK) if len(texts) else texts
    yield from (run for run in np.split(texts, np.flatnonzero(np.diff(number)) + 1) if len(run))
