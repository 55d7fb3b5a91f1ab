"""Columns of texts cut into tokens, as arrays: no Python object for a text or a word.

The bytes of a column are translated at once: to lower case, or to a space where they separate tokens. Beyond ASCII that
holds for some characters only; a function sees to texts with any others.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from orpo_data.hashing import number_hashes

SPACE = ord(" ")
WINDOW = 1 << 21  # bytes that are looked up together
SIGN, LETTER = 1, 2
LONGEST = 64  # bytes of a word that is hashed in columns; longer ones are rare, one of 10 MB too
MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)
LOWER = np.array([ord(chr(point).lower()[0]) for point in range(0x800)], np.uint32)  # of characters of two bytes
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd

Kind = TypeVar("Kind", bound=np.generic)
Bytes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]
Ranges = tuple[tuple[int, int], ...]
"""First and last of runs of code points."""


@dataclass(frozen=True)
class Rules:
    """What separates tokens, and what they look like in the end.

    table  what becomes of each byte: from `ascii_table`
    kinds  what each character beyond ASCII is: a `SIGN`, which separates tokens, a `LETTER`, which belongs to them in
           its lower case, or else one for which the whole text takes its `final` form: from `character_kinds`
    final  what becomes of such a text, before the table is applied
    """

    table: bytes
    kinds: NDArray[np.uint8]
    final: Callable[[str], str]


def ascii_table(separates: Callable[[str], bool]) -> bytes:
    """Lower case, or a space where the ASCII character separates tokens; other bytes as they are."""
    letters = (" " if separates(letter) else letter.lower() for letter in map(chr, range(128)))
    return "".join(letters).encode() + bytes(range(128, 256))


def character_kinds(signs: Ranges, letters: Ranges) -> NDArray[np.uint8]:
    """What each character is, 0 where it is neither; a sign is no letter."""
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    for kind, ranges in ((LETTER, letters), (SIGN, signs)):
        for first, last in ranges:
            kinds[first : last + 1] = kind
    return kinds


FINAL = Rules(ascii_table(lambda letter: letter == " "), character_kinds((), ((0, sys.maxunicode),)), str)
"""For texts that are tokens with spaces between already."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of n texts, in order: `starts` and `ends` in `data`, `counts` for each text."""

    data: Bytes
    starts: Places
    ends: Places
    counts: Places

    @classmethod
    def of(cls, texts: pl.Series, rules: Rules) -> Self:
        """Tokens of a column of strings without nulls."""
        raw, offsets = _buffers(texts)
        if len(raw) and raw.max() > 127:
            raw, offsets = _beyond_ascii(texts, raw, offsets, rules)
        data = np.empty_like(raw)  # `bytes.translate` keeps the interpreter's lock
        look_up(np.frombuffer(rules.table, np.uint8), raw, data, WINDOW)
        inside = data != SPACE
        edge = np.zeros_like(inside)  # the byte before, or behind, belongs to the same text and to a token
        edge[1:] = inside[:-1]
        edge[offsets[offsets < len(data)]] = False
        starts = np.flatnonzero(inside & ~edge)
        edge[:-1] = inside[1:]
        edge[offsets[offsets > 0] - 1] = False
        ends = np.flatnonzero(inside & ~edge) + 1
        return cls(data, starts, ends, np.diff(np.searchsorted(starts, offsets)))

    def joined(self) -> pl.Series:
        """The texts as their tokens with a single space between."""
        first = np.zeros(len(self.starts), bool)
        begins = np.cumsum(self.counts) - self.counts
        first[begins[self.counts > 0]] = True
        keep = self.data != SPACE
        keep[self.starts[~first] - 1] = True
        sizes = np.cumsum(np.concatenate([[0], self.ends - self.starts + ~first]))
        bounds = np.concatenate([[0], sizes[begins + self.counts]]).astype(np.int64)
        buffers = pa.py_buffer(bounds), pa.py_buffer(self.data[keep])
        return pl.Series(pa.LargeStringArray.from_buffers(len(begins), *buffers))

    def hashes(self) -> Hashes:
        """A 64-bit hash of each token, the same on every machine; not meant to resist who looks for collisions."""
        sizes = self.ends - self.starts
        padded = np.concatenate([self.data, np.zeros(8, np.uint8)])
        eight = np.ndarray(len(self.data) + 1, np.dtype("<u8"), padded, strides=(1,))  # bytes from each byte on
        found = mixed(eight[self.starts] & MASKS[np.minimum(sizes, 8)] ^ sizes.astype(np.uint64) * GOLDEN)
        longer = np.flatnonzero((sizes > 8) & (sizes <= LONGEST))
        for done in range(8, LONGEST, 8):
            if not len(longer):
                break
            piece = eight[self.starts[longer] + done] & MASKS[np.minimum(sizes[longer] - done, 8)]
            found[longer] = mixed(found[longer] * GOLDEN ^ piece)
            longer = longer[sizes[longer] > done + 8]
        longest = np.flatnonzero(sizes > LONGEST)
        contents = [self.data[self.starts[word] : self.ends[word]].tobytes() for word in longest.tolist()]
        found[longest] = number_hashes(pl.Series(contents, dtype=pl.Binary))
        return found


def mixed(values: Hashes) -> Hashes:
    """Each bit of a value spread over all bits (MurmurHash3's finaliser, a bijection)."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


def combined(first: Hashes, *more: Hashes) -> Hashes:
    """One hash for several, in their order."""
    for other in more:
        first = mixed(first * GOLDEN ^ other)
    return first


def look_up(table: NDArray[Kind], places: NDArray[Any], found: NDArray[Kind], window: int) -> None:
    """Sets `found` to table[places], a window at a time: numpy makes each place a number of eight bytes first."""
    for start in range(0, len(places), window):
        some = slice(start, start + window)
        table.take(places[some], out=found[some], mode="wrap")  # "wrap" spares take a check and a copy


def ordered(values: NDArray[Kind]) -> NDArray[Kind]:
    """Sorted whole numbers: numpy's `sort` takes three times as long on processors of AMD that have AVX-512."""
    found: NDArray[Kind] = pl.Series(values).sort(multithreaded=False).to_numpy()
    return found


def distinct(values: NDArray[Kind]) -> NDArray[Kind]:
    """Sorted distinct values: numpy's `unique` goes by a hash table, which takes several times as long."""
    values = ordered(values)
    first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


def among(values: NDArray[Kind], known: NDArray[Kind]) -> NDArray[np.bool_]:
    """Whether each of the values is one of those known, which are `distinct`: numpy's `isin` hashes them all first."""
    if not len(known):
        return np.zeros(len(values), bool)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
    return found


def _beyond_ascii(texts: pl.Series, raw: Bytes, offsets: Places, rules: Rules) -> tuple[Bytes, Places]:
    """`_buffers` of texts of which only the ASCII bytes are left to look at."""
    leads, points = _characters(raw)
    wild = leads[rules.kinds[points] == 0]
    if len(wild):
        rows = distinct(np.searchsorted(offsets, wild, "right") - 1)
        final = pl.Series(map(rules.final, texts.gather(rows).to_list()), dtype=pl.String)
        raw, offsets = _buffers(texts.clone().scatter(rows, final))
        leads, points = _characters(raw)
    data, kinds = raw.copy(), rules.kinds[points]
    for byte, least in enumerate((0, 0, 0x800, 0x10000)):
        data[leads[(kinds == SIGN) & (points >= least)] + byte] = SPACE
    cased = (kinds == LETTER) & (points < len(LOWER))
    lower = LOWER[points[cased]]
    data[leads[cased]] = 0xC0 | lower >> 6
    data[leads[cased] + 1] = 0x80 | lower & 0x3F
    return data, offsets


def _characters(raw: Bytes) -> tuple[Places, NDArray[np.uint32]]:
    """Where the characters beyond ASCII begin in UTF-8, and which they are."""
    leads = np.flatnonzero(raw >= 0xC0)
    first = raw[leads]
    points = (first & np.where(first < 0xE0, 0x1F, np.where(first < 0xF0, 0x0F, 0x07))).astype(np.uint32)
    for byte, least in ((1, 0xC0), (2, 0xE0), (3, 0xF0)):
        more = first >= least
        points[more] = points[more] << 6 | raw[leads[more] + byte] & 0x3F
    return leads, points


def _buffers(texts: pl.Series) -> tuple[Bytes, Places]:
    """The bytes of a column, one text after the other, and the n + 1 places where they begin and end."""
    array = texts.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    _, places, content = array.buffers()
    offsets = np.frombuffer(places, np.int64, len(array) + 1, array.offset * 8)
    data = np.frombuffer(content, np.uint8) if content and content.size else np.empty(0, np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]
