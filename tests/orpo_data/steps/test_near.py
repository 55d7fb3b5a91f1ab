"""Words, runs of words and keys: of a single text by definition, of a column the same."""

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.steps.near import (
    LETTERS,
    SIGNS,
    WORDS,
    key_of,
    keys_of,
    normalised,
    shingles,
    word_tokens,
    words,
)


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


# --- columns ---------------------------------------------------------------------------------------------------------

piece = st.one_of(
    st.sampled_from(
        ["oak ", "Elm", "don\u2019t ", "\u201cIT\u201d", "3.5", "_", " ", "\n", "\u00a0", "\x1c", "?", "\u2026"]
    ),
    st.sampled_from(
        [
            "caf\u00e9 ",
            "CAF\u00c9",
            "e\u0301",
            "\u0301",
            "\u00df",
            "\u0130",
            "\ufb01",
            "\u03a3\u03c2",
            "\u0416",
            "=\u0338",
        ]
    ),
    st.sampled_from(
        [
            "\u6771\u4eac",
            "\u30ab\u3099",
            "\u0e01\u0e33",
            "\u0645\u0631",
            "\U0001f600\ufe0f\u200d",
            "\u00bd",
            "\u2163",
            "x" * 70,
        ]
    ),
    st.text(max_size=3),
)
texts = st.lists(st.lists(piece, max_size=6).map("".join), max_size=6)


@given(texts)
@example([])
@example(["", ""])
@example(["?!", "", "a", " "])
def test_columns_have_the_words_and_keys_of_their_texts(texts: list[str]) -> None:
    column = pl.Series(texts, dtype=pl.String)
    tokens = word_tokens(column)
    assert tokens.joined().to_list() == [normalised(text) for text in texts]
    assert tokens.counts.tolist() == [len(words(text)) for text in texts]
    assert keys_of(column, tokens).to_list() == [key_of(text) for text in texts]


@given(texts, st.integers(0, 5))
def test_a_word_has_one_hash_in_any_text(texts: list[str], cut: int) -> None:
    column = pl.Series(texts, dtype=pl.String)
    names = [word for text in texts for word in words(text)]
    hashes = word_tokens(column).hashes().tolist()
    assert len(set(names)) == len(set(hashes)) == len(set(zip(names, hashes, strict=True)))
    parts = [word_tokens(part).hashes().tolist() for part in (column[:cut], column[cut:])]
    assert parts[0] + parts[1] == hashes


def test_hashes_are_the_same_on_every_machine_and_in_every_release() -> None:
    """Notes are kept on disk from run to run: where these change, the version of each step that takes them must."""
    hashes = word_tokens(pl.Series(["oak Stra\u00dfe incomprehensibilities " + "x" * 65])).hashes()
    assert [f"{value:016x}" for value in hashes.tolist()] == [
        "f88fcf848c190b19",
        "4d40c4a6976afcb4",
        "fe1636b877706d04",
        "9537c5fdf120482f",
    ]


def test_signs_and_letters_beyond_ascii_are_what_they_are_taken_for() -> None:
    for first, last in SIGNS:
        assert {tuple(words(f"a{chr(point)}b\u0301")) for point in range(first, last + 1)} == {("a", "b")}
    for first, last in LETTERS:
        for letter in map(chr, range(first, last + 1)):
            assert words(f"a{letter}b") == [f"a{letter.lower()}b"]


@pytest.mark.parametrize(
    "text",
    [
        "Don\u2019t \u2013 \u201cwait\u201d\u2026 \U0001f600",
        "Un caf\u00e9, \u00c0 bient\u00f4t",
        "\u041f\u0440\u0438\u0432\u0435\u0442",
    ],
)
def test_ordinary_text_needs_no_look_at_the_single_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    column = pl.Series([text])
    expected = keys_of(column, word_tokens(column)).to_list()
    monkeypatch.setattr("orpo_data.steps.near.WORDS", type(WORDS)(WORDS.table, WORDS.kinds, lambda text: "other"))
    assert keys_of(column, word_tokens(column)).to_list() == expected == [key_of(text)]
    assert word_tokens(pl.Series(["\u6771"])).joined().to_list() == ["other"]
