"""Texts to token ids: exactly those of the tokenizer, many times as fast.

Most words of a text were seen before. So texts are cut, in columns, into pieces whose ids do not depend on what stands
around them (`orpo_data.pieces` says why); the tokenizer sees each distinct piece once, and all others take their ids
from a table. It is shown many of them as one text, with an added token between, at whose ids they are parted again.
"""

from collections.abc import Sequence
from itertools import chain
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from orpo_data.errors import OrpoError
from orpo_data.pieces import cut, cut_pairs, separators
from orpo_data.ragged import as_bytes, merge
from orpo_data.steps.tokens import Hashes, among, ordered

_MEMORY = 1 << 24  # bytes that the table may grow to; then a new one is begun
_LATEST = 1 << 20  # bytes of the latest pieces, which have a table of their own: to add to one is to copy it
_TOGETHER = 200  # pieces that are shown to the tokenizer as one text: alone each takes it nearly twice as long
_CHECKED = 4096  # one text in so many is also encoded whole, and the 1st, 2nd, 4th, 8th and so on before


class _Table(NamedTuple):
    """Known pieces, found by their hashes; nothing alters it."""

    hashes: Hashes  # sorted and distinct
    places: npt.NDArray[np.int32]  # of their pieces in the columns below
    pieces: pa.StringArray
    ids: pa.BinaryArray  # as `orpo_data.ragged` has them: bytes are taken faster than lists

    @classmethod
    def of(cls, pieces: pa.StringArray, hashes: Hashes, ids: pa.BinaryArray) -> "_Table":
        """Of several pieces with one hash only one has a place."""
        hashes, first = np.unique(hashes, return_index=True)
        return cls(hashes, first.astype(np.int32), pieces, ids)

    def find(self, pieces: pa.StringArray, hashes: Hashes) -> tuple[npt.NDArray[np.bool_], pa.BinaryArray]:
        """Which of the pieces are known, and the ids of these, as bytes."""
        if not len(self.hashes):
            return np.zeros(len(pieces), np.bool_), self.ids
        found, order = np.empty(len(hashes), np.int64), _nearly_in_order(hashes)
        found[order] = np.searchsorted(self.hashes, hashes[order])  # four times as fast so
        np.minimum(found, len(self.hashes) - 1, out=found)
        places, known = self.places[found], self.hashes[found] == hashes
        known &= pc.equal(self.pieces.take(pa.array(places)), pieces).to_numpy(zero_copy_only=False)
        return known, self.ids.take(pa.array(places[known]))

    def with_more(self, other: "_Table") -> "_Table":
        """And the pieces of `other` whose hashes are not here yet."""
        new = ~among(other.hashes, self.hashes)
        hashes = np.concatenate([self.hashes, other.hashes[new]])
        places = np.concatenate([self.places, other.places[new] + np.int32(len(self.pieces))])
        order = np.argsort(hashes, kind="stable")  # two sorted runs: they are merged
        pieces, ids = (pa.concat_arrays(both) for both in ([self.pieces, other.pieces], [self.ids, other.ids]))
        return _Table(hashes[order], places[order], pieces, ids)

    @property
    def bytes(self) -> int:
        return int(sum(column.nbytes for column in self))


_NOTHING = _Table(np.empty(0, np.uint64), np.empty(0, np.int32), pa.array([], pa.string()), pa.array([], pa.binary()))


class Encoder:
    """Encodes columns of text; may be called from several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pairs = cut_pairs(tokenizer)
        self._separators = separators(tokenizer)
        self._tables = (_NOTHING, _NOTHING)  # the latest pieces are in the second one
        self._seen = 0  # texts
        self._lock = Lock()

    def encode(self, texts: pa.StringArray) -> pa.ListArray:
        """Token ids of each text as list<int32>: those of `encode_batch_fast(texts, add_special_tokens=False)`."""
        [ids] = self.encode_all([texts])
        return ids

    def encode_all(self, columns: Sequence[pa.StringArray]) -> list[pa.ListArray]:
        """`encode` of each column; what they have in common is looked up once."""
        if self._pairs is None:
            return [self._encode_whole(texts.to_pylist()) for texts in columns]
        parted = [cut(texts, self._pairs) for texts in columns]
        distinct, places = _distinct([pieces for pieces, _ in parted])
        ids = self._look_up(distinct, _hashes(distinct), self._tables)
        encoded = [merge(ids.take(own), bounds) for own, (_, bounds) in zip(places, parted, strict=True)]
        for column in zip(columns, encoded, strict=True):
            self._check(*column)
        return encoded

    def _encode_whole(self, texts: list[str]) -> pa.ListArray:
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        ends = np.cumsum([0, *map(len, found)], dtype=np.int32)
        ids = np.fromiter(chain.from_iterable(found), np.int32, count=int(ends[-1]))
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(ids))

    def _look_up(self, pieces: pa.StringArray, hashes: Hashes, tables: Sequence[_Table]) -> pa.BinaryArray:
        """Ids of distinct pieces, as bytes; those that are in none of the tables get into one."""
        if not tables:
            ids = as_bytes(self._encode_pieces(pieces))
            self._learn(_Table.of(pieces, hashes, ids))
            return ids
        known, ids = tables[0].find(pieces, hashes)
        if len(ids) == len(pieces):
            return ids
        others = self._look_up(pieces.filter(pa.array(~known)), hashes[~known], tables[1:])
        order = np.where(known, np.cumsum(known), len(ids) + np.cumsum(~known)) - 1
        return pa.concat_arrays([ids, others]).take(pa.array(order))

    def _learn(self, new: _Table) -> None:
        with self._lock:
            known, latest = self._tables
            latest = latest.with_more(new)
            if latest.bytes > _LATEST:
                known, latest = (_NOTHING if known.bytes > _MEMORY else known).with_more(latest), _NOTHING
            self._tables = known, latest

    def _encode_pieces(self, pieces: pa.StringArray) -> pa.ListArray:
        """As `_encode_whole`, which has a price for each text: here many stand in one, behind an added token each."""
        texts = pieces.to_pylist()
        separator = next((token for token in self._separators if not _any_has(pieces, token)), None)
        if separator is None:
            return self._encode_whole(texts)
        parts = (texts[start : start + _TOGETHER] for start in range(0, len(texts), _TOGETHER))
        ids = self._encode_whole([separator + separator.join(part) for part in parts]).values.to_numpy()
        separates = ids == self._separators[separator]
        starts, others = np.flatnonzero(separates), ids[~separates]
        if len(starts) != len(pieces):
            return self._encode_whole(texts)
        ends = np.append(starts - np.arange(len(starts)), len(others))
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(others))

    def _check(self, texts: pa.StringArray, encoded: pa.ListArray) -> None:
        """OrpoError if the ids of a sample are not those of its whole texts."""
        with self._lock:
            numbers = range(self._seen, self._seen + len(texts))
            self._seen = numbers.stop
        first = [1 << power for power in range(_CHECKED.bit_length())]
        later = numbers[-numbers.start % _CHECKED :: _CHECKED]
        sample = pa.array([numbers.index(n) for n in sorted({*first, *later}) if n in numbers], pa.int64())
        if not len(sample):
            return
        whole = self._encode_whole(texts.take(sample).to_pylist())
        if not encoded.take(sample).equals(whole):
            raise OrpoError(
                "tokenize.tokenizer: a text cut in pieces has other ids than the whole: the installed version of the "
                "package tokenizers splits texts in an unknown way; install the one that constraints.txt names"
            )


def _distinct(columns: Sequence[pa.StringArray]) -> tuple[pa.StringArray, list[pa.Int32Array]]:
    """The distinct values of all columns, and for each column the places of its own among them."""
    chunks = pa.chunked_array(columns, pa.string()).dictionary_encode().chunks  # an empty column has none
    values = chunks[0].dictionary if chunks else pa.array([], pa.string())
    places = (chunk.indices for chunk in chunks)
    return values, [next(places) if len(column) else pa.array([], pa.int32()) for column in columns]


def _hashes(pieces: pa.StringArray) -> Hashes:
    """The same only as long as the process runs."""
    return pl.Series(pieces).hash().to_numpy()


def _nearly_in_order(hashes: Hashes) -> npt.NDArray[np.int64]:
    """The places of hashes, sorted by these but for their last bits, which give way to the place."""
    last = np.uint64((1 << len(hashes).bit_length()) - 1)
    return (ordered(hashes & ~last | np.arange(len(hashes), dtype=np.uint64)) & last).astype(np.int64)


def _any_has(pieces: pa.StringArray, text: str) -> bool:
    return bool(pc.any(pc.match_substring(pieces, text)).as_py())
