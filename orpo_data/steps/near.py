"""Near-duplicate texts: runs of words, MinHash-LSH to find candidates, exact Jaccard similarity to judge them.

Nothing here depends on the order in which texts arrive: whether two texts are candidates, and how similar they are,
follows from the two alone.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash, RMinHashLSH

SHINGLE_WORDS = 3
PERMUTATIONS = 128
LEAST_PART = 0.25  # similarity that every part of two near-duplicates must have
MISSED = 1e-3  # at most this share of the pairs that are exactly as similar as the threshold is overlooked

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and ideographs: written without spaces
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")

Match = tuple[int, float]
"""Number and similarity of an indexed text."""


@dataclass(frozen=True)
class Sketch:
    """What is kept of a text: for each of its parts the sorted distinct hashes of its shingles; MinHash of them all."""

    parts: tuple[NDArray[np.uint32], ...]  # 32 bits: half the memory, and collisions are far below what counts
    minhash: Any


def words(text: str) -> list[str]:
    """The words of a text in one case and one unicode form; an ideograph is a word of its own."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def normalised(text: str) -> str:
    """Words only: what remains when punctuation, case and spacing are set aside."""
    return " ".join(words(text))


def key_of(text: str) -> str:
    """Hash of the normalised text; of the text itself where it has no words."""
    return hashlib.sha256((normalised(text) or text).encode()).hexdigest()[:32]


def prompt_text(prompt: list[dict[str, str]]) -> str:
    """The turns of a prompt as one text, without their roles."""
    return "\n".join(turn["content"] for turn in prompt)


def shingles(text: str) -> list[str]:
    """Runs of three words; a shorter text is one run, one without words stands for itself, a blank one has none."""
    found = words(text) or ([text] if text.strip() else [])
    return [" ".join(found[i : i + SHINGLE_WORDS]) for i in range(max(bool(found), len(found) - SHINGLE_WORDS + 1))]


def similarity(a: Sketch, b: Sketch) -> float:
    """Jaccard similarity of all parts together; 0 where one part has hardly anything in common.

    A long prompt that two rows share must not make near-duplicates of answers that differ altogether.
    """
    shared = [len(np.intersect1d(x, y, assume_unique=True)) for x, y in zip(a.parts, b.parts, strict=True)]
    either = [len(x) + len(y) - both for x, y, both in zip(a.parts, b.parts, shared, strict=True)]
    if any(both < LEAST_PART * some for both, some in zip(shared, either, strict=True)):
        return 0.0
    return sum(shared) / sum(either) if any(either) else 1.0


class Index:
    """Finds those of the texts added before that are at least `threshold` similar to another.

    A text may have several parts, e.g. prompt and answers; all texts of an index have as many. A run of words counts
    for its part alone: a pair and the same with its answers exchanged are not alike.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._rows = rows_per_band(threshold)
        self._bands = PERMUTATIONS // self._rows
        self._lsh: Any = RMinHashLSH(threshold, self._rows * self._bands, self._bands)
        self._sketches: list[Sketch] = []

    def sketch(self, *parts: str) -> Sketch:
        """A text as this index, and any other of the same threshold, takes it."""
        runs = [shingles(part) for part in parts]
        minhash = RMinHash(num_perm=self._rows * self._bands, seed=0)
        minhash.update([f"{i} {shingle}" for i, part in enumerate(runs) for shingle in part])
        hashed = RMinHash.hash_token_sets(runs)
        return Sketch(tuple(np.unique(np.array(hashes, np.uint64).astype(np.uint32)) for hashes in hashed), minhash)

    def add(self, sketch: Sketch) -> int:
        """Add a text; its number counts from 0."""
        self._lsh.insert(len(self._sketches), sketch.minhash)
        self._sketches.append(sketch)
        return len(self._sketches) - 1

    def matches(self, sketch: Sketch, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Match]:
        """Number and similarity of every text added before that is similar enough, unless its number is not wanted."""
        for number in self._lsh.query(sketch.minhash):
            if wanted(number) and (alike := similarity(sketch, self._sketches[number])) >= self.threshold:
                yield number, alike


def rows_per_band(threshold: float) -> int:
    """The most rows a band may have (so the fewest false candidates) for pairs at the threshold to be found.

    A pair of similarity s shares a band of r rows with probability s^r, so all b bands miss it with (1 - s^r)^b.
    """
    fitting = (r for r in range(8, 1, -1) if (1 - threshold**r) ** (PERMUTATIONS // r) <= MISSED)
    return next(fitting, 1)


class Groups:
    """Union-find over keys; a group's name is its smallest key, whatever the order of the unions."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, key: str) -> str:
        """The name of the key's group; a key never seen is alone in its own."""
        root = key
        while (parent := self._parent.get(root, root)) != root:
            root = parent
        while key != root:
            self._parent[key], key = root, self._parent[key]
        return root

    def union(self, a: str, b: str) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        if low != high:
            self._parent[high] = low


def near_groups(texts: Iterable[str], threshold: float) -> Groups:
    """Groups over `key_of(text)`: two texts that are at least `threshold` similar share one, and so do chains of such.

    Order independent. Equal texts after normalisation have the same key and so the same group.
    """
    groups, index, numbered = Groups(), Index(threshold), dict[str, int]()
    keys: list[str] = []
    for text in texts:
        if (key := key_of(text)) in numbered:
            continue
        sketch = index.sketch(text)
        for number, _ in index.matches(sketch, lambda other: groups.find(keys[other]) != groups.find(key)):
            groups.union(key, keys[number])
        numbered[key] = index.add(sketch)
        keys.append(key)
    return groups
