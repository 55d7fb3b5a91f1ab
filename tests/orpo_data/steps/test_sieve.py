"""All that may overlap passes, and next to nothing else."""

import polars as pl
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.steps.near import normalised, words
from orpo_data.steps.sieve import Sieve

word = st.sampled_from(["oak", "Elm", "ash ", "Stra\u00dfe", "\u6771", "?", "\u2019", "x" * 70])
text = st.lists(word, max_size=7).map(" ".join)


@given(st.lists(text, max_size=6), st.lists(text, max_size=3), st.lists(text, max_size=2), st.integers(1, 4))
@example(["oak elm", "?!", ""], [], [], 3)
def test_what_passes(texts: list[str], held: list[str], whole: list[str], length: int) -> None:
    runs = {" ".join(words(text)[i : i + length]) for text in held for i in range(len(words(text)) - length + 1)}
    whole = [normalised(text) for text in whole]
    passing = Sieve(runs, length, whole).passing(pl.Series(texts, dtype=pl.String)).tolist()
    expected = [
        not words(text) or normalised(text) in whole or any(f" {run} " in f" {normalised(text)} " for run in runs)
        for text in texts
    ]
    assert passing == [place for place, passes in enumerate(expected) if passes]
