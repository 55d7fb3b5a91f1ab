"""Sketches hold the runs of words of each part, and similar texts share a band as often as was promised."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.steps.minhash import MISSED, MOST_VALUES, bands_of, sketches
from orpo_data.steps.near import shingles, word_tokens


def sketched(*parts: list[str], threshold: float = 0.7) -> dict[str, list[list[int]]]:
    columns = [pl.Series(part, dtype=pl.String) for part in parts]
    found = sketches(columns, [word_tokens(column) for column in columns], threshold)
    return {name: column.to_pylist() for name, column in found.items()}


@pytest.mark.parametrize("threshold", [0.41, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_pairs_at_the_threshold_are_seldom_overlooked(threshold: float) -> None:
    bands, values = bands_of(threshold)
    assert (1 - threshold**values) ** bands <= MISSED
    assert bands * values <= MOST_VALUES
    if bands > 1:
        assert (1 - threshold**values) ** (bands - 1) > MISSED  # no more bands than it takes
        more = math.ceil(math.log(MISSED) / math.log1p(-(threshold ** (values + 1))))
        assert values == 8 or more * (values + 1) > MOST_VALUES  # and the most values that do


word = st.sampled_from(["oak", "elm", "ash", "fir", "Stra\u00dfe", "?", "\u6771"])
text = st.lists(word, max_size=9).map(" ".join)


@given(st.lists(st.tuples(text, text), max_size=6), st.integers(0, 6))
@example([("", "?!")], 0)
def test_a_sketch_is_of_its_row_alone(rows: list[tuple[str, str]], cut: int) -> None:
    parts = [[row[i] for row in rows] for i in range(2)]
    whole = sketched(*parts)
    assert whole["sizes"] == [[len(set(shingles(part))) for part in row] for row in rows]
    for runs, sizes in zip(whole["shingles"], whole["sizes"], strict=True):
        first, second = runs[: sizes[0]], runs[sizes[0] :]
        assert len(second) == sizes[1]
        assert (first, second) == (sorted(set(first)), sorted(set(second)))
    pieces = [sketched(*[part[:cut] for part in parts]), sketched(*[part[cut:] for part in parts])]
    assert {name: pieces[0][name] + pieces[1][name] for name in whole} == whole


@given(st.lists(text, min_size=2, max_size=6))
def test_runs_are_equal_where_their_words_are(texts: list[str]) -> None:
    runs = sketched(texts)["shingles"]
    for a, some in zip(texts, runs, strict=True):
        for b, others in zip(texts, runs, strict=True):
            assert len(set(some) & set(others)) == len(set(shingles(a)) & set(shingles(b)))


def test_bands_are_shared_as_often_as_promised() -> None:
    """Texts of 59 runs that share 71 % with another: a band of r values is shared with probability 0.7^r."""
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(400):
        words = [f"w{number}" for number in random.integers(2**40, size=71).tolist()]
        shared = words[:51]  # 49 runs of 59 + 59 - 49
        pairs.append((" ".join(shared + words[51:61]), " ".join(shared + words[61:71])))
    first, second = (sketched(list(side))["bands"] for side in zip(*pairs, strict=True))
    bands, values = bands_of(0.7)
    hits = sum(a == b for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))
    expected = (49 / 69) ** values
    spread = math.sqrt(expected * (1 - expected) / (400 * bands))
    assert abs(hits / (400 * bands) - expected) < 5 * spread
    assert sum(not set(enumerate(a)) & set(enumerate(b)) for a, b in zip(first, second, strict=True)) <= 3


def test_sketches_are_the_same_in_every_release() -> None:
    """They are kept on disk from run to run: where they change, the version of each step that takes them must."""
    found = sketched(["oak elm ash fir", "?!"], ["", "yew"], threshold=1.0)
    assert found == {
        "shingles": [[434226158, 435042325], [4188771320, 1936173918]],
        "sizes": [[2, 0], [1, 1]],
        "bands": [[168225192], [1442573392]],
    }
