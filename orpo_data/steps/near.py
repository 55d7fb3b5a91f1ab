"""What makes texts near-duplicates: their words, and the runs of three words that two of them share.

Functions on a single text are the definition. `word_tokens` gives the words of a whole column of texts.
"""

import hashlib
import re
import unicodedata

import polars as pl

from orpo_data.hashing import hex_hashes
from orpo_data.steps.tokens import Rules, Tokens, ascii_table, character_kinds

SHINGLE_WORDS = 3

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and ideographs: written without spaces
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")

# beyond ASCII: signs and spaces that neither belong to a word nor have a letter in their compatibility form
SIGNS = (
    *((0xA0, 0xA7), (0xA9, 0xA9), (0xAB, 0xAE), (0xB0, 0xB1), (0xB6, 0xB7), (0xBB, 0xBB), (0xBF, 0xBF), (0xD7, 0xD7)),
    *((0xF7, 0xF7), (0x2010, 0x2029), (0x202F, 0x205E), (0x20A0, 0x20A7), (0x20A9, 0x20C0), (0x2190, 0x2319)),
    *((0x2500, 0x2775), (0x2794, 0x27BF), (0x3000, 0x3003), (0x3008, 0x3011), (0xFE0F, 0xFE0F), (0xFF01, 0xFF01)),
    *((0xFF0C, 0xFF0C), (0xFF1A, 0xFF1B), (0xFF1F, 0xFF1F), (0x1F300, 0x1FAFF)),
)
# and letters that have no other form, save for their case: Latin, Cyrillic, Arabic
LETTERS = ((0xC0, 0xD6), (0xD8, 0xDE), (0xE0, 0xF6), (0xF8, 0xFF), (0x410, 0x44F), (0x621, 0x63A), (0x641, 0x64A))


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


WORDS = Rules(ascii_table(lambda letter: not WORD.match(letter)), character_kinds(SIGNS, LETTERS), normalised)


def word_tokens(texts: pl.Series) -> Tokens:
    """The words of each text of a column."""
    return Tokens.of(texts, WORDS)


def keys_of(texts: pl.Series, tokens: Tokens) -> pl.Series:
    """`key_of` each text, from its `word_tokens`."""
    return hex_hashes(tokens.joined().zip_with(pl.Series(tokens.counts > 0), texts))
