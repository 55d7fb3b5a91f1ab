"""Texts as they compare when case, spacing and punctuation are set aside."""

import polars as pl

INVISIBLE = r"\p{Cf}"  # zero-width spaces, joiners, byte order marks, direction marks
# signs that decide what a formula, a number or a file name says are no punctuation here
SPACING = r"[\p{P}\s\p{Cc}&&[^-+*/%&@#\\]]+"


def folded(text: pl.Expr) -> pl.Expr:
    """Unicode NFKC, lower case, punctuation and white space as one space; the text itself if nothing else is there."""
    compatible = text.str.normalize("NFKC").str.to_lowercase().str.replace_all(INVISIBLE, "")
    words = compatible.str.replace_all(SPACING, " ").str.strip_chars()
    return pl.when(words.str.contains(r"[\p{L}\p{N}\p{S}]")).then(words).otherwise(text)
