r"""Texts to token ids: exactly those of the tokenizer, five to twenty times as fast.

Most words of a text were seen before. So texts are cut, in columns, into pieces whose ids do not depend on what stands
around them; the tokenizer sees each distinct piece once, and all others take their ids from a table.

Why the ids are the same. A byte-level BPE tokenizer takes its added tokens out of the text, splits the rest with a
regular expression and encodes every part by itself. A cut changes nothing where no added token and no part reaches
across it, no look-around sees across it and no normalization joins its two sides. Texts are cut at two places:

- before a space that follows anything but white space;
- between an ASCII letter and an ASCII character that is neither letter, digit nor apostrophe.

None of the expressions in `SPLITS` can match both characters of such a pair, and their only look-around, `\s+(?!\S)`,
ends in white space, so never at a cut. NFC joins no ASCII character to what stands before it. Where an added token has
such a pair inside, the pair is never cut. Tokenizers of other kinds are given whole texts.
"""

import json
from dataclasses import dataclass, field
from itertools import chain, repeat
from string import ascii_letters
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

from orpo_data.errors import OrpoError

Pairs = npt.NDArray[np.bool_]
"""One entry for each pair of bytes, at first * 256 + second."""

WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""Unicode's White_Space: what `\\s` matches."""

_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-3": rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "qwen-2": rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "qwen-3.5": rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
}
"""Expressions that match across no cut. So does GPT-2's, which `ByteLevel` brings along."""

_SPACE = ord(" ")
_MEMORY = 1 << 26  # bytes that a table may grow to, about; then a new one is begun
_ENTRY = 170  # of them, what a piece takes beside its text
_CHECKED = 1024  # one text in so many is also encoded whole


@dataclass
class _Table:
    """Known pieces."""

    places: dict[str, int] = field(default_factory=dict)
    ids: pa.ListArray = field(default_factory=lambda: pa.array([], pa.list_(pa.int32())))
    size: int = 0


class Encoder:
    """Encodes columns of text; may be called from several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pairs = cut_pairs(tokenizer)
        self._table = _Table()
        self._lock = Lock()

    def encode(self, texts: pa.StringArray) -> pa.ListArray:
        """Token ids of each text as list<int32>: those of `encode_batch_fast(texts, add_special_tokens=False)`."""
        if self._pairs is None:
            return self._encode_whole(texts.to_pylist())
        pieces, rows = cut(texts, self._pairs)
        distinct = pieces.dictionary_encode()
        places, known = self._look_up(distinct.dictionary.to_pylist())
        ids = known.take(places.take(distinct.indices))
        encoded = pa.ListArray.from_arrays(ids.offsets.take(rows), ids.values)
        self._check(texts, encoded)
        return encoded

    def _encode_whole(self, texts: list[str]) -> pa.ListArray:
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, found)], dtype=np.int32)
        ids = np.fromiter(chain.from_iterable(found), np.int32, count=int(offsets[-1]))
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))

    def _look_up(self, pieces: list[str]) -> tuple[pa.Int32Array, pa.ListArray]:
        """Each piece's place among the ids of all known pieces, and those ids, which nothing alters any more."""
        with self._lock:
            if self._table.size > _MEMORY:
                self._table = _Table()
            table = self._table
            places = np.fromiter(map(table.places.get, pieces, repeat(-1)), np.int32, count=len(pieces))
            if len(missing := np.flatnonzero(places < 0)):
                new = [pieces[at] for at in missing]
                places[missing] = np.arange(len(new)) + len(table.ids)
                table.ids = pa.concat_arrays([table.ids, self._encode_whole(new)])
                table.places.update(zip(new, places[missing].tolist(), strict=True))
                table.size += sum(map(len, new)) + _ENTRY * len(new)
            return pa.array(places), table.ids

    def _check(self, texts: pa.StringArray, encoded: pa.ListArray) -> None:
        """OrpoError if the ids of a sample are not those of its whole texts."""
        sample = pa.array(range(0, len(texts), _CHECKED), pa.int32())
        whole = self._encode_whole(texts.take(sample).to_pylist())
        if not encoded.take(sample).equals(whole):
            raise OrpoError(
                "tokenize.tokenizer: a text cut in pieces has other ids than the whole: the installed version of the "
                "package tokenizers splits texts in an unknown way; install the one that constraints.txt names"
            )


def cut(texts: pa.StringArray, pairs: Pairs) -> tuple[pa.StringArray, pa.Int32Array]:
    """The pieces of all texts, and for each text the number of pieces before it, with the number of all at the end."""
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    ends = offsets - offsets[0]
    letters = (data | 32) - np.uint8(ord("a")) < 26
    cuts = np.flatnonzero((data[1:] == _SPACE) | (letters[:-1] > letters[1:])) + 1
    before = data[cuts - 1].astype(np.uint16)
    allowed = pairs[before << 8 | data[cuts]]
    wide = np.flatnonzero(before >= 128)
    allowed[wide] &= ~_WIDE_SPACES[data[cuts[wide] - 2].astype(np.uint16) << 8 | before[wide]]
    cuts = cuts[allowed]
    earlier = np.searchsorted(cuts, ends)
    bounds = np.insert(cuts, earlier, ends).astype(np.int32)
    pieces = pa.StringArray.from_buffers(len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(data))
    return pieces, pa.array((earlier + np.arange(len(ends))).astype(np.int32))


def cut_pairs(tokenizer: Tokenizer) -> Pairs | None:
    """Where a text may be cut: between which two bytes; None if it must stay whole."""
    added = tokenizer.get_added_tokens_decoder().values()
    model, normalizer, splitter = tokenizer.model, tokenizer.normalizer, tokenizer.pre_tokenizer
    if not (
        isinstance(model, BPE)
        and not model.dropout
        and isinstance(normalizer, NFC | None)
        and tokenizer.truncation is tokenizer.padding is None
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and not (normalizer and any(token.normalized for token in added))
        and splitter
        and _splits_at_cuts(json.loads(splitter.__getstate__()))
    ):
        return None
    table = np.zeros((256, 256), np.bool_)
    others = [code for code in range(128) if not chr(code).isalnum() and chr(code) != "'"]
    table[np.ix_(list(ascii_letters.encode()), others)] = True
    table[:, _SPACE] = True
    table[[code for code in range(128) if chr(code) in WHITE_SPACE], _SPACE] = False
    for token in added:
        content = list(token.content.encode())
        table[content[:-1], content[1:]] = False
    return table.reshape(-1)


def _splits_at_cuts(splitter: dict[str, Any]) -> bool:
    """Whether a pre_tokenizer of tokenizer.json is one for which the argument above holds."""
    *before, last = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    return (
        all(part["type"] == "Digits" or _is_split(part) for part in before)
        and last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and (last["use_regex"] or any(map(_is_split, before)))
    )


def _is_split(part: dict[str, Any]) -> bool:
    return (
        part["type"] == "Split"
        and part["pattern"].get("Regex") in SPLITS.values()
        and part["behavior"] == "Isolated"
        and not part["invert"]
    )


def _wide_spaces() -> Pairs:
    """The last two bytes of all white space beyond ASCII; that a few other characters end alike costs some cuts."""
    table = np.zeros(256 * 256, np.bool_)
    ends = np.array([list(char.encode()[-2:]) for char in WHITE_SPACE if not char.isascii()])
    table[ends[:, 0] * 256 + ends[:, 1]] = True
    return table


_WIDE_SPACES = _wide_spaces()
