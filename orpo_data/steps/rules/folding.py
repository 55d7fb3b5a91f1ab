"""Texts as they compare when case, spacing and punctuation are set aside."""

import polars as pl

from orpo_data.steps.rules.rule import only_where

INVISIBLE = r"\p{Cf}"  # zero-width spaces, joiners, byte order marks, direction marks
# signs that decide what a formula, a number or a file name says are no punctuation here
SPACING = r"[\p{P}\s\p{Cc}&&[^-+*/%&@#\\]]+"
OPENING = 48  # characters


def folded(text: pl.Expr) -> pl.Expr:
    """Unicode NFKC, lower case, punctuation and white space as one space; the text itself if nothing else is there."""
    words = _words(text)
    return pl.when(words.str.contains(r"[\p{L}\p{N}\p{S}]")).then(words).otherwise(text)


def _words(text: pl.Expr) -> pl.Expr:
    compatible = text.str.normalize("NFKC").str.to_lowercase().str.replace_all(INVISIBLE, "")
    return compatible.str.replace_all(SPACING, " ").str.strip_chars()


def same_folded(one: pl.Expr, other: pl.Expr) -> pl.Expr:
    """`folded(one) == folded(other)`: most texts differ in their first words, only the others are folded as a whole."""
    texts = [one.alias("one"), other.alias("other")]
    openings = [_opening(text).name.suffix("_opening") for text in texts]
    first, second = pl.col("one_opening"), pl.col("other_opening")
    alike = (first.str.starts_with(second) | second.str.starts_with(first)).fill_null(True)
    same = folded(pl.col("one")) == folded(pl.col("other"))
    return only_where(alike, same, [*texts, *openings], pl.Boolean()).fill_null(False)


def _opening(text: pl.Expr) -> pl.Expr:
    """The first words as they begin the folded text; null if no space is near.

    What follows a space changes no letter before it: no accent joins it, and a sigma is final or not all the same.
    """
    return _words(text.str.head(OPENING).str.extract(r"(?s)^(.*)[ \n]"))
