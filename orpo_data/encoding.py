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

_MEMORY = 1 << 23  # bytes that the table may grow to; then a new one is begun
_TOGETHER = 1_000  # pieces that are shown to the tokenizer as one text
_CHECKED = 1024  # one text in so many is also encoded whole

_FILLER = " a"  # stands before each of them, because before a space and behind a letter a text may be cut


class _Table(NamedTuple):
    """Known pieces; nothing alters it."""

    pieces: pa.StringArray
    ids: pa.ListArray

    def with_more(self, pieces: pa.StringArray, ids: pa.ListArray) -> "_Table":
        return _Table(pa.concat_arrays([self.pieces, pieces]), pa.concat_arrays([self.ids, ids]))


_NOTHING = _Table(pa.array([], pa.string()), pa.array([], pa.list_(pa.int32())))


class Encoder:
    """Encodes columns of text; may be called from several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pairs = cut_pairs(tokenizer)
        self._table = _NOTHING
        self._lock = Lock()

    def encode(self, texts: pa.StringArray) -> pa.ListArray:
        """Token ids of each text as list<int32>: those of `encode_batch_fast(texts, add_special_tokens=False)`."""
        if self._pairs is None:
            return self._encode_whole(texts.to_pylist())
        pieces, rows = cut(texts, self._pairs)
        distinct = pieces.dictionary_encode()
        ids = self._look_up(distinct.dictionary).take(distinct.indices)
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
        table = self._table
        places = pc.index_in(pieces, value_set=table.pieces)
        unknown = places.is_null()
        new = pieces.filter(unknown)
        if not len(new):
            return table.ids.take(places)
        ids = self._encode_pieces(new)
        self._learn(table, new, ids)
        behind = pa.array(np.arange(len(new), dtype=np.int32) + len(table.pieces))
        return pa.concat_arrays([table.ids, ids]).take(pc.replace_with_mask(places, unknown, behind))

    def _learn(self, table: _Table, pieces: pa.StringArray, ids: pa.ListArray) -> None:
        """Put in pieces that were not in `table`."""
        with self._lock:
            if self._table is not table:  # another thread was here in the meantime
                unknown = pc.index_in(pieces, value_set=self._table.pieces).is_null()
                pieces, ids = pieces.filter(unknown), ids.filter(unknown)
            full = self._table.pieces.nbytes + self._table.ids.nbytes > _MEMORY
            self._table = (_NOTHING if full else self._table).with_more(pieces, ids)

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
        ends, token_ends = np.stack(_bounds(pieces), axis=1).ravel(), np.cumsum(self._token_sizes[ids])
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

    @cached_property
    def _token_sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each token, by its id."""
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = {place: len(token) for token, place in self._tokenizer.get_vocab(with_added_tokens=False).items()}
        sizes |= {place: len(token.content.encode()) for place, token in added.items()}
        found = np.zeros(max(sizes) + 1, np.int64)
        found[list(sizes)] = list(sizes.values())
        return found

    def _check(self, texts: pa.StringArray, encoded: pa.ListArray) -> None:
        """OrpoError if the ids of a sample are not those of its whole texts."""
        sample = pa.array(range(0, len(texts), _CHECKED), pa.int32())
        whole = self._encode_whole(texts.take(sample).to_pylist())
        if not encoded.take(sample).equals(whole):
            raise OrpoError(
                "tokenize.tokenizer: a text cut in pieces has other ids than the whole: the installed version of the "
                "package tokenizers splits texts in an unknown way; install the one that constraints.txt names"
            )


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
