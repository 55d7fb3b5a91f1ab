r"""Where a text may be cut so that the ids of its pieces, one after the other, are those of the whole.

A byte-level BPE tokenizer takes its added tokens out of the text, splits the rest with a regular expression and encodes
every part by itself. A cut changes nothing where no added token and no part reaches across it, no look-around sees
across it and no normalization joins its two sides. Texts are cut at three places:

- before a space that follows anything but white space;
- between an ASCII letter and an ASCII character that is neither letter, digit nor apostrophe;
- on both sides of an ASCII digit, if the tokenizer parts the text at every digit before it does anything else.

None of the expressions in `SPLITS` can match both characters of such a pair, and their only look-around, `\s+(?!\S)`,
ends in white space, so never at one of the first two cuts; at a digit it sees no further than the part. NFC joins no
ASCII character to what stands before it. Where an added token has such a pair inside, the pair is never cut. Tokenizers
of other kinds are given whole texts.
"""

import json
from itertools import pairwise
from string import ascii_letters
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

from orpo_data.ragged import offsets
from orpo_data.steps.tokens import Bytes, look_up

Pairs = npt.NDArray[np.bool_]
"""One entry for each pair of bytes, at first + second * 256."""

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

_WINDOW = 1 << 19  # bytes that are looked at together: what is found of them stays in the processor's cache
_SPACE = ord(" ")
_DIGITS = slice(ord("0"), ord("9") + 1)


def cut(texts: pa.StringArray, pairs: Pairs) -> tuple[pa.StringArray, npt.NDArray[np.int64]]:
    """The pieces of all texts, and for each text the number of pieces before it, with the number of all at the end."""
    places = offsets(texts)
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[places[0] : places[-1]]
    ends = places - places[0]
    parted = np.zeros(len(data) + 1, np.bool_)  # before which bytes it is cut
    _part(data, pairs, parted[1:-1])
    parted[ends] = True
    bounds = np.flatnonzero(parted).astype(np.int32)
    pieces = pa.StringArray.from_buffers(len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(data))
    return pieces, np.searchsorted(bounds, ends)


def _part(data: Bytes, pairs: Pairs, parted: npt.NDArray[np.bool_]) -> None:
    """Sets whether it is cut between a byte and the next one: `parted` has one entry less than there are bytes."""
    both = np.ndarray(len(parted), "<u2", data, strides=(1,))
    look_up(pairs, both, parted, _WINDOW)
    wide = np.flatnonzero((data[:-1] >= 128) & (data[1:] == _SPACE))
    parted[wide[_WIDE_SPACES[data[wide - 1].astype(np.uint16) << 8 | data[wide]]]] = False


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
    if _parts_digits(json.loads(splitter.__getstate__())):
        table[:, _DIGITS] = table[_DIGITS, :128] = True
    for token in added:
        content = list(token.content.encode())
        table[content[:-1], content[1:]] = False
    return table.T.reshape(-1)


def separators(tokenizer: Tokenizer) -> dict[str, int]:
    """Added tokens that part a text wherever they are written, and their ids: no other one overlaps or begins with it.

    What stands between two of them has the ids of a text of its own, if the tokenizer is one of those described above.
    """
    added = {token.content: code for code, token in tokenizer.get_added_tokens_decoder().items()}
    inner = {char for content in added for char in content[1:]}
    return {
        content: added[content]
        for content, following in pairwise([*sorted(added), ""])
        if content[0] not in inner and not following.startswith(content)
    }


def _splits_at_cuts(splitter: dict[str, Any]) -> bool:
    """Whether a pre_tokenizer of tokenizer.json is one for which the argument above holds."""
    *before, last = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    return (
        all(part["type"] == "Digits" or _is_split(part) for part in before)
        and last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and (last["use_regex"] or any(map(_is_split, before)))
    )


def _parts_digits(splitter: dict[str, Any]) -> bool:
    first = splitter["pretokenizers"][0] if splitter["type"] == "Sequence" else splitter
    return first["type"] == "Digits" and bool(first["individual_digits"])


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
