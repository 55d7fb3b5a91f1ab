"""Texts that are alike are found, whatever came before them and in whichever order."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.steps.near import (
    LEAST_PART,
    MISSED,
    PERMUTATIONS,
    Index,
    key_of,
    near_groups,
    normalised,
    rows_per_band,
    shingles,
    similarity,
    words,
)


def alike(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    index = Index(0.5)
    return similarity(index.sketch(*a), index.sketch(*b))


TEN = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Ein GROSSER  Straße-Test!\n", ["ein", "grosser", "strasse", "test"]),
        ("cafe\u0301 \ufb01ne \uff21BC", ["café", "fine", "abc"]),
        ("東京タワーは hello", ["東", "京", "タ", "ワ", "ー", "は", "hello"]),
        ("snake_case 3.5", ["snake_case", "3", "5"]),
        ("?! \n", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected
    assert normalised(text) == " ".join(expected)


def test_keys_are_equal_where_the_words_are() -> None:
    assert key_of("How are you?") == key_of("  HOW are,\nyou")
    assert key_of("?") != key_of("!")  # no words: the text itself


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("a b c d", ["a b c", "b c d"]),
        ("a b c", ["a b c"]),
        ("A!", ["a"]),
        ("?!", ["?!"]),
        (" \n", []),
    ],
)
def test_shingles(text: str, runs: list[str]) -> None:
    assert shingles(text) == runs


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
def test_similarity(a: tuple[str, ...], b: tuple[str, ...], expected: float) -> None:
    assert alike(a, b) == alike(b, a) == pytest.approx(expected)


def test_the_least_similarity_of_a_part() -> None:
    """Two of eight runs are just enough, two of nine too few."""
    assert LEAST_PART == 2 / 8
    enough, too_few = (("a b c d e f g", f"a b c d {rest}") for rest in ("x y z", "x y z u"))
    assert alike((TEN, enough[0]), (TEN, enough[1])) == pytest.approx((8 + 2) / (8 + 8))
    assert alike((TEN, too_few[0]), (TEN, too_few[1])) == 0


@pytest.mark.parametrize("threshold", [0.41, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0])
def test_pairs_at_the_threshold_are_seldom_overlooked(threshold: float) -> None:
    rows = rows_per_band(threshold)
    missed = [(1 - threshold**r) ** (PERMUTATIONS // r) for r in (rows, rows + 1)]
    assert missed[0] <= MISSED
    assert missed[1] > MISSED or rows == 8  # the most rows that do


def test_matches_reach_the_threshold() -> None:
    index = Index(0.75)
    for last in ("ten", "eleven", "ten eleven twelve thirteen fourteen"):
        index.add(index.sketch(f"{TEN[:-4]} {last}"))
    assert sorted(index.matches(index.sketch(TEN))) == [(0, 1.0), (1, pytest.approx(7 / 9))]
    assert list(index.matches(index.sketch(TEN), wanted=lambda number: number == 1)) == [(1, pytest.approx(7 / 9))]


def test_a_run_that_stands_in_several_parts_counts_in_each() -> None:
    """Ten parts share 4 runs each, and the last has 2 of its own: 40 of 44, while only 4 of 8 runs are common words."""
    index = Index(0.9)
    first, second = (("a b c d e f",) * 9 + (f"a b c d e f {own}",) for own in ("g h", "x y"))
    index.add(index.sketch(*first))
    assert list(index.matches(index.sketch(*second))) == [(0, pytest.approx(40 / 44))]


word = st.sampled_from(["oak", "elm", "ash", "fir", "yew", "box"])
texts = st.lists(st.lists(word, max_size=9).map(" ".join), max_size=14)


@given(texts, st.sampled_from([0.5, 0.7, 1.0]), st.randoms())
@example(["oak elm ash fir yew", "oak elm ash fir box", "oak elm ash fir"], 0.5, None)
def test_groups_are_the_chains_of_similar_texts(texts: list[str], threshold: float, random: object) -> None:
    """Checked against all pairs, which decides here too: at this size bands overlook next to nothing."""
    index = Index(threshold)
    sketches = [index.sketch(text) for text in texts]
    expected = {number: {number} for number in range(len(texts))}
    for a, b in itertools.combinations(range(len(texts)), 2):
        found = threshold <= similarity(sketches[a], sketches[b]) or key_of(texts[a]) == key_of(texts[b])
        if found and expected[a] is not expected[b]:
            expected[a] |= expected[b]
            for member in expected[b]:
                expected[member] = expected[a]
    groups = near_groups(texts, threshold)
    names = [groups.find(key_of(text)) for text in texts]
    for a, b in itertools.combinations(range(len(texts)), 2):
        assert (names[a] == names[b]) == (b in expected[a])
    if random:
        shuffled = list(texts)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        again = near_groups(shuffled, threshold)
        assert [again.find(key_of(text)) for text in texts] == names


def test_a_group_is_named_after_its_smallest_key() -> None:
    chain = ["a b c d e f g", "b c d e f g h", "c d e f g h i"]
    groups = near_groups(chain, 0.6)  # 4 runs of 6 between neighbours, 3 of 7 between the ends
    assert {groups.find(key_of(text)) for text in chain} == {min(map(key_of, chain))}
    assert groups.find("never seen") == "never seen"
