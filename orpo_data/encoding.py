"""Texts to token ids: exactly those of the tokenizer, many times as fast.

Most words of a text were seen before. So texts are cut, in columns, into pieces whose ids do not depend on what stands
around them (`orpo_data.pieces` says why); the tokenizer sees each distinct piece once, and all others take their ids
from a table. Pieces between which a text might have been cut are shown to it as one text, which is cut in ids again.
"""

from functools import cached_property
from itertools import chain
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from orpo_data.errors import OrpoError
from orpo_data.pieces import BYTES, cut, cut_pairs
from orpo_data.steps.tokens import Hashes, Tokens, among, distinct

_MEMORY = 1 << 24  # bytes that the table may grow to; then a new one is begun
_TOGETHER = 200  # pieces that are shown to the tokenizer as one text: of longer ones each piece costs it more
_CHECKED = 4096  # one text in so many is also encoded whole, and the 1st, 2nd, 4th, 8th and so on before

_FILLER = " a"  # stands before each of them, because before a space and behind a letter a text may be cut


class _Table(NamedTuple):
    """Known pieces, found by their hashes; nothing alters it."""

    hashes: Hashes  # sorted and distinct
    places: npt.NDArray[np.int32]  # of their pieces in the columns below
    pieces: pa.StringArray
    ids: pa.ListArray

    def find(self, pieces: pa.StringArray, hashes: Hashes) -> tuple[pa.BooleanArray, pa.ListArray]:
        """Which of the pieces are known, and the ids of these."""
        if not len(self.hashes):
            return pa.array(np.zeros(len(pieces), np.bool_)), self.ids
        found = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        places = pa.array(self.places[found])
        known = pc.and_(pa.array(self.hashes[found] == hashes), pc.equal(self.pieces.take(places), pieces))
        return known, self.ids.take(places.filter(known))

    def with_more(self, pieces: pa.StringArray, hashes: Hashes, ids: pa.ListArray) -> "_Table":
        """And those that it does not have yet; of several with one hash only one has a place."""
        hashes, first = np.unique(hashes, return_index=True)
        new = ~among(hashes, self.hashes)
        hashes, taken = hashes[new], pa.array(first[new])
        at = np.searchsorted(self.hashes, hashes)
        return _Table(
            np.insert(self.hashes, at, hashes),
            np.insert(self.places, at, np.arange(len(hashes)) + len(self.pieces)),
            pa.concat_arrays([self.pieces, pieces.take(taken)]),
            pa.concat_arrays([self.ids, ids.take(taken)]),
        )

    @property
    def bytes(self) -> int:
        return int(sum(column.nbytes for column in self))


_NOTHING = _Table(
    np.empty(0, np.uint64), np.empty(0, np.int32), pa.array([], pa.string()), pa.array([], pa.list_(pa.int32()))
)


class Encoder:
    """Encodes columns of text; may be called from several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pairs = cut_pairs(tokenizer)
        self._added = tokenizer.get_added_tokens_decoder()
        self._sizes = np.zeros(0, np.int64)  # bytes of each token, by its id; 0 where it has not been seen
        self._table = _NOTHING
        self._seen = 0  # texts
        self._lock = Lock()

    def encode(self, texts: pa.StringArray) -> pa.ListArray:
        """Token ids of each text as list<int32>: those of `encode_batch_fast(texts, add_special_tokens=False)`."""
        if self._pairs is None:
            return self._encode_whole(texts.to_pylist())
        pieces, rows = cut(texts, self._pairs)
        coded = pieces.dictionary_encode()
        ids = self._look_up(coded.dictionary).take(coded.indices)
        encoded = pa.ListArray.from_arrays(ids.offsets.take(rows), ids.values)
        self._check(texts, encoded)
        return encoded

    def _encode_whole(self, texts: list[str]) -> pa.ListArray:
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, found)], dtype=np.int32)
        ids = np.fromiter(chain.from_iterable(found), np.int32, count=int(offsets[-1]))
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))

    def _look_up(self, pieces: pa.StringArray) -> pa.ListArray:
        """Ids of distinct pieces; those that are new get into the table."""
        hashes = _hashes(pieces)
        known, ids = self._table.find(pieces, hashes)
        if len(ids) == len(pieces):
            return ids
        unknown = pc.invert(known)
        new, more = pieces.filter(unknown), hashes[unknown.to_numpy(zero_copy_only=False)]
        new_ids = self._encode_pieces(new)
        with self._lock:
            self._table = (_NOTHING if self._table.bytes > _MEMORY else self._table).with_more(new, more, new_ids)
        order = pc.array_sort_indices(known, order="descending")
        return pa.concat_arrays([ids, new_ids]).take(pa.array(np.argsort(order.to_numpy())))

    def _encode_pieces(self, pieces: pa.StringArray) -> pa.ListArray:
        """As `_encode_whole`, which has a price for each text."""
        joins = self._joins(pieces)
        joined = self._encode_joined(pieces.filter(pa.array(joins)))
        others = self._encode_whole(pieces.filter(pa.array(~joins)).to_pylist())
        order = np.argsort(np.concatenate([np.flatnonzero(joins), np.flatnonzero(~joins)]))
        return pa.concat_arrays([joined, others]).take(pa.array(order))

    def _joins(self, pieces: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Which pieces would be cut out again of a text in which fillers stand between them.

        And whose bytes have a token each, so that the tokens of a piece are as long as it is.
        """
        assert self._pairs is not None
        text = "".join(_joined(pieces)) + _FILLER
        whole, _ = cut(pa.array([text], pa.string()), self._pairs)
        starts, ends = _bounds(pieces)
        can_part = np.zeros(len(text.encode()) + 1, np.bool_)
        can_part[np.frombuffer(whole.buffers()[1], np.int32)] = True
        strange = np.cumsum(np.append(False, ~self._has_token[np.frombuffer(text.encode(), np.uint8)]))
        found: npt.NDArray[np.bool_] = can_part[starts] & can_part[ends] & (strange[starts] == strange[ends])
        return found

    def _encode_joined(self, pieces: pa.StringArray) -> pa.ListArray:
        """Pieces that join; they are encoded one by one after all if their ends are no ends of tokens."""
        if not len(pieces):
            return _NOTHING.ids
        ids = self._encode_whole(_joined(pieces)).values.to_numpy()
        ends, token_ends = np.stack(_bounds(pieces), axis=1).ravel(), np.cumsum(self._token_sizes(ids))
        places = np.searchsorted(token_ends, ends)
        if token_ends[-1] != ends[-1] or (token_ends[places] != ends).any():
            return self._encode_whole(pieces.to_pylist())
        offsets = pa.array(np.concatenate([[0], places + 1]), pa.int32())
        both = pa.ListArray.from_arrays(offsets, pa.array(ids))
        return both.take(pa.array(np.arange(1, len(both), 2)))

    @cached_property
    def _has_token(self) -> npt.NDArray[np.bool_]:
        """Bytes that have a token of their own and that no normalization changes."""
        known = np.array([self._tokenizer.token_to_id(char) is not None for char in BYTES])
        if self._tokenizer.normalizer:
            known[128:] = False
        return known

    def _token_sizes(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Bytes of each token; those that are new are asked for by one thread at a time."""
        with self._lock:
            sizes = np.pad(self._sizes, (0, max(0, int(ids.max()) + 1 - len(self._sizes))))
            new = distinct(ids[sizes[ids] == 0])
            sizes[new] = [self._token_size(token) for token in new.tolist()]
            self._sizes = sizes
        return sizes[ids]

    def _token_size(self, token: int) -> int:
        if token in self._added:
            return len(self._added[token].content.encode())
        return len(self._tokenizer.id_to_token(token) or "")

    def _check(self, texts: pa.StringArray, encoded: pa.ListArray) -> None:
        """OrpoError if the ids of a sample are not those of its whole texts."""
        with self._lock:
            numbers, self._seen = self._seen + np.arange(len(texts)), self._seen + len(texts)
        sample = pa.array(np.flatnonzero((numbers & (numbers - 1) == 0) | (numbers % _CHECKED == 0)))
        if not len(sample):
            return
        whole = self._encode_whole(texts.take(sample).to_pylist())
        if not encoded.take(sample).equals(whole):
            raise OrpoError(
                "tokenize.tokenizer: a text cut in pieces has other ids than the whole: the installed version of the "
                "package tokenizers splits texts in an unknown way; install the one that constraints.txt names"
            )


def _hashes(pieces: pa.StringArray) -> Hashes:
    offsets = np.frombuffer(pieces.buffers()[1], np.int32)[pieces.offset :][: len(pieces) + 1].astype(np.int64)
    data = np.frombuffer(pieces.buffers()[2] or b"", np.uint8)
    return Tokens(data, offsets[:-1], offsets[1:], np.empty(0, np.int64)).hashes()


def _joined(pieces: pa.StringArray) -> list[str]:
    """Texts of so many pieces each, every one behind a filler."""
    texts = pieces.to_pylist()
    parts = (texts[start : start + _TOGETHER] for start in range(0, len(texts), _TOGETHER))
    return [_FILLER + _FILLER.join(part) for part in parts]


def _bounds(pieces: pa.StringArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each piece begins and ends in these texts, one behind the other, in bytes."""
    sizes = pc.binary_length(pieces).to_numpy().astype(np.int64)
    ends = np.cumsum(sizes + len(_FILLER))
    return ends - sizes, ends
