"""Whole messages as they compare when case, spacing and Unicode form are set aside: equal hashes, equal messages.

Punctuation counts, for `2 + 2` is not `2 * 2`.
"""

import unicodedata

import polars as pl

from orpo_data.hashing import number_hashes
from orpo_data.steps.near import LETTERS
from orpo_data.steps.notes import CONTENT
from orpo_data.steps.tokens import Hashes, Rules, Tokens, ascii_table, character_kinds

BETWEEN = "\x1f"  # stands between role and content, and between turns; in a content it is white space
# beyond ASCII: characters that are no white space and have no other form, save for the case of letters
TAME = (
    *LETTERS,
    *((0xA1, 0xA7), (0xA9, 0xA9), (0xAB, 0xAC), (0xAE, 0xAE), (0xB0, 0xB1), (0xB6, 0xB7), (0xBB, 0xBB), (0xBF, 0xBF)),
    *((0xD7, 0xD7), (0xF7, 0xF7), (0x2010, 0x2010), (0x2012, 0x2016), (0x2018, 0x2023), (0x2030, 0x2032)),
    *((0x2044, 0x2044), (0x20A9, 0x20C0), (0x2190, 0x222B), (0x2231, 0x2319), (0x2500, 0x27BF), (0x3001, 0x3029)),
    *((0x3041, 0x3096), (0x30A1, 0x30FA), (0x30FC, 0x30FC), (0x4E00, 0x9FFF), (0xFE0F, 0xFE0F), (0x1F300, 0x1FAFF)),
)


def folded(turns: str) -> str:
    """Roles and contents with `BETWEEN` between them, each folded."""
    return f" {BETWEEN} ".join(map(_folded, turns.split(BETWEEN)))


FOLDS = Rules(ascii_table(lambda sign: sign.isspace() and sign != BETWEEN), character_kinds((), TAME), folded)


def message_hashes(frame: pl.DataFrame, side: str) -> Hashes:
    """A hash of the messages in each row of a column."""
    content = CONTENT.str.replace_all(BETWEEN, " ", literal=True)
    turn = pl.element().struct.field("role") + f" {BETWEEN} " + content
    turns = frame.select(pl.col(side).list.eval(turn).list.join(f" {BETWEEN} ")).to_series()
    return number_hashes(Tokens.of(turns, FOLDS).joined())


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
