"""What is alike is found, whatever its order and however it is cut into parts: checked against all pairs."""

import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.mapped import let_go, map_stream
from orpo_data.steps import alike as module
from orpo_data.steps.alike import Sketches, across, best_first, chains
from orpo_data.steps.minhash import LEAST_PART, sketches
from orpo_data.steps.near import shingles, word_tokens

Text = tuple[str, ...]
TEN = "one two three four five six seven eight nine ten"


def sketched(texts: list[Text], threshold: float, chunk: int = 100) -> Sketches:
    """Texts of as many parts each, in chunks of some rows."""
    tables = []
    for start in range(0, max(1, len(texts)), chunk):
        some = texts[start : start + chunk]
        parts = [pl.Series([text[i] for text in some], dtype=pl.String) for i in range(len(texts[0]) if texts else 1)]
        tables.append(pa.table(sketches(parts, [word_tokens(part) for part in parts], threshold)))
    return Sketches(pa.concat_tables(tables), threshold)


def jaccard(a: Text, b: Text) -> float:
    """By definition."""
    runs = [(set(shingles(x)), set(shingles(y))) for x, y in zip(a, b, strict=True)]
    shared, either = [len(x & y) for x, y in runs], [len(x | y) for x, y in runs]
    if any(both < LEAST_PART * some for both, some in zip(shared, either, strict=True)):
        return 0.0
    return sum(shared) / sum(either) if any(either) else 1.0


def alike(a: Text, b: Text) -> float:
    first, second = np.array([0, 1]), np.array([1, 0])
    there, back = sketched([a, b], 0.5).similarity(first, second).tolist()
    assert there == back == jaccard(a, b)
    return there


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((TEN,), (TEN.replace("ten", "eleven"),), 7 / 9),  # 8 runs each, the last differs
        ((TEN,), (TEN.upper() + "!",), 1),
        ((TEN, "a b c d"), (TEN, "a b c x"), (8 + 1) / (8 + 3)),
        ((TEN, "yes"), (TEN, "no"), 0),  # 8 of 10 runs are shared, yet the second part has nothing in common
        ((TEN, "yes", "no"), (TEN, "no", "yes"), 0),  # answers exchanged
        (("", "a b c"), ("", "a b c"), 1),
        (("a b c", "a b c"), ("", "a b c"), 0),
        (("",), (" ",), 1),
    ],
)
def test_similarity(a: Text, b: Text, expected: float) -> None:
    assert alike(a, b) == expected


@pytest.mark.parametrize("at_once", [1, 20, 1 << 19])
def test_pairs_are_compared_in_several_threads(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Each pair has its own similarity, however many are compared together."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    texts = [(" ".join(TEN.split()[: 3 + i % 8]),) for i in range(40)]
    first, second = np.array(list(combinations(range(len(texts)), 2))).T
    found = sketched(texts, 0.5, chunk=7).alike(np.arange(len(texts)), first, second)
    pairs = [(i, j, jaccard(texts[i], texts[j])) for i, j in combinations(range(len(texts)), 2)]
    assert list(zip(*(column.tolist() for column in found), strict=True)) == [pair for pair in pairs if pair[2] >= 0.5]


def test_the_least_similarity_of_a_part() -> None:
    """Two of eight runs are just enough, two of nine too few."""
    assert LEAST_PART == 2 / 8
    enough, too_few = (("a b c d e f g", f"a b c d {rest}") for rest in ("x y z", "x y z u"))
    assert alike((TEN, enough[0]), (TEN, enough[1])) == (8 + 2) / (8 + 8)
    assert alike((TEN, too_few[0]), (TEN, too_few[1])) == 0


def test_a_run_that_stands_in_several_parts_counts_in_each() -> None:
    """Ten parts share 4 runs each, and the last has 2 of its own: 40 of 44, while only 4 of 8 runs are common words."""
    first, second = (("a b c d e f",) * 7 + (f"a b c d e f {own}",) for own in ("g h", "x y"))
    assert alike(first, second) == 32 / 36


word = st.sampled_from(["oak", "elm", "ash", "fir", "yew", "Stra\u00dfe", "?", "\u6771"])
text = st.lists(word, max_size=9).map(" ".join)
texts = st.integers(1, 2).flatmap(lambda parts: st.lists(st.tuples(*[text] * parts), max_size=12))
thresholds = st.sampled_from([0.5, 0.7, 1.0])
chunks = st.integers(1, 5)


@given(texts, thresholds, chunks, st.randoms(use_true_random=False))
def test_the_best_stay_and_each_other_goes_to_the_most_similar(
    texts: list[Text], threshold: float, chunk: int, random: Any
) -> None:
    """Against all pairs, which decides here too: at this size bands overlook next to nothing."""
    rows = np.array(random.sample(range(len(texts)), len(texts)), np.int64)
    kept, expected = list[int](), {}
    for place, row in enumerate(rows):
        like = [(jaccard(texts[row], texts[rows[other]]), -other) for other in kept]
        similarity, other = max(like, default=(0.0, 0))
        if similarity >= threshold:
            expected[place] = (-other, similarity)
        else:
            kept.append(place)
    found = best_first(sketched(texts, threshold, chunk), rows)
    assert {first: rest for first, *rest in zip(*map(list, found), strict=True)} == {
        place: list(match) for place, match in expected.items()
    }


@given(texts, thresholds, chunks, st.randoms(use_true_random=False))
@example([("oak elm ash fir yew",), ("oak elm ash fir",), ("oak elm ash fir oak",)], 0.5, 2, None)
def test_chains_link_what_is_alike(texts: list[Text], threshold: float, chunk: int, random: Any) -> None:
    order = random.sample(range(len(texts)), len(texts)) if random else list(range(len(texts)))
    expected = list(range(len(texts)))
    for a, b in combinations(range(len(texts)), 2):
        if jaccard(texts[order[a]], texts[order[b]]) >= threshold:
            low, high = sorted((expected[a], expected[b]))
            expected = [low if label == high else label for label in expected]
    assert chains(sketched(texts, threshold, chunk), np.array(order, np.int64)).tolist() == expected


@given(texts, thresholds, chunks, st.data())
def test_across_finds_every_pair(texts: list[Text], threshold: float, chunk: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(texts))))
    cut = data.draw(st.integers(0, len(texts)))
    some, others = np.array(order[:cut], np.int64), np.array(order[cut:], np.int64)
    pairs = product(range(len(some)), range(len(others)))
    similar = [(a, b, jaccard(texts[some[a]], texts[others[b]])) for a, b in pairs]
    found = across(sketched(texts, threshold, chunk), some, others)
    assert sorted(zip(*map(list, found), strict=True)) == [pair for pair in similar if pair[2] >= threshold]


def test_of_several_the_most_similar_then_the_best() -> None:
    names = [f"w{number}" for number in range(60)]
    for start, closest in ((9, 1), (8, 0)):  # 29 of 47 runs of the first and 31 of 45 of the second; as many of each
        texts = [(" ".join(names[at : at + 40]),) for at in (0, 16, start)]
        found = best_first(sketched(texts, 0.6), np.arange(3))
        assert (found.first.tolist(), found.second.tolist()) == ([2], [closest])


def test_a_long_chain_needs_no_luck() -> None:
    """Each text is like the next: every second one stays."""
    names = [f"w{number}" for number in range(300)]
    texts = [(" ".join(names[start : start + 40]),) for start in range(0, 240, 3)]  # 35 of 41 runs, 32 of 44, 29 of 47
    found = best_first(sketched(texts, 0.8), np.arange(len(texts)))
    assert found.first.tolist() == list(range(1, len(texts), 2))
    assert set(chains(sketched(texts, 0.8), np.arange(len(texts))).tolist()) == {0}


@pytest.mark.skipif(sys.platform != "linux", reason="asks how much of a file is resident")
@pytest.mark.parametrize("every", [1, 5])
def test_sketches_in_a_file_are_read_a_few_chunks_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    rows, bands = 100_000, 64  # 26 MB of bands
    table = pa.table(
        {
            "shingles": pa.array([[]] * rows, pa.list_(pa.uint32())),
            "bands": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(rows * bands, dtype=np.uint32)), bands),
            "sizes": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows, np.uint32)), 1),
        }
    )
    with pa.ipc.new_stream(str(tmp_path / "notes.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=1_000)
    resident = []

    def looked() -> None:
        resident.append(psutil.Process().memory_info().shared)
        let_go()

    sketches = Sketches(map_stream(tmp_path / "notes.arrow"), 0.7)
    looked()
    monkeypatch.setattr(module, "let_go", looked)
    for number, band in enumerate(sketches.each_band(np.arange(0, rows, every))):
        assert band.tolist() == list(range(number, rows * bands, bands * every))
        looked()
    assert max(resident) - resident[0] < 8_000_000
