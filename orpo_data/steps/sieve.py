"""A first look at columns of texts, before each that may hold one of many runs of words is searched for them."""

from collections.abc import Iterable

import numpy as np
import polars as pl
from numpy.typing import NDArray

from orpo_data.steps.near import word_tokens
from orpo_data.steps.notes import Rows
from orpo_data.steps.tokens import FINAL, GOLDEN, Hashes, Places, Tokens, among, distinct, mixed

BITS = np.uint64(20)  # of a hash, for a table that says no to nearly all: it stays in the processor's cache


class Sieve:
    """Lets every text pass that holds one of some runs of words, all of one length, or is one of some texts.

    Others pass by chance, if at all; a text without words always does. All runs and texts are normalised.
    """

    def __init__(self, runs: Iterable[str], length: int, whole: Iterable[str]) -> None:
        self._length = length
        (_, held), whole_ones = _runs(*_final(runs), length), _whole(*_final(text for text in whole if text))
        self._runs, self._whole = _Known(held), _Known(whole_ones)

    def passing(self, texts: pl.Series) -> Rows:
        """The places of texts that pass."""
        tokens = word_tokens(texts)
        words, counts = tokens.hashes(), tokens.counts
        places, runs = _runs(words, counts, self._length)
        passing = places[self._runs.has(runs)], np.flatnonzero(counts)[self._whole.has(_whole(words, counts))]
        return distinct(np.concatenate([*passing, np.flatnonzero(counts == 0)]))


class _Known:
    """A set of hashes."""

    def __init__(self, hashes: Hashes) -> None:
        self._hashes = distinct(hashes)
        self._possible = np.zeros(1 << int(BITS), bool)
        self._possible[_head(hashes)] = True

    def has(self, hashes: Hashes) -> Rows:
        """The places of hashes that are among these."""
        possible = np.flatnonzero(self._possible[_head(hashes)])
        return possible[among(hashes[possible], self._hashes)]


def _head(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes >> (np.uint64(64) - BITS)).astype(np.int64)


def _final(texts: Iterable[str]) -> tuple[Hashes, Places]:
    """The hashes of the words of normalised texts, and how many each has."""
    tokens = Tokens.of(pl.Series(list(texts), dtype=pl.String), FINAL)
    return tokens.hashes(), tokens.counts


def _runs(words: Hashes, counts: Places, length: int) -> tuple[Rows, Hashes]:
    """The text and the hash of every run of so many words within a text."""
    many = max(0, len(words) - length + 1)
    found = np.zeros(many, np.uint64)
    for place in range(length):
        found = found * GOLDEN + words[place : place + many]
    text = np.repeat(np.arange(len(counts)), counts)
    within = text[:many] == text[len(text) - many :]
    return text[:many][within], mixed(found[within])


def _whole(words: Hashes, counts: Places) -> Hashes:
    """The hash of each text that has words."""
    counts = counts[counts > 0]
    begins = np.cumsum(counts) - counts
    place = np.arange(len(words)) - np.repeat(begins, counts)
    return mixed(np.add.reduceat(mixed(words + place.astype(np.uint64) * GOLDEN), begins))
