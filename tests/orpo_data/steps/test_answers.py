"""Answers fold in columns as they do one by one."""

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.hashing import number_hashes
from orpo_data.steps.answers import MARKS, TAME, alike, hashes_and_words
from orpo_data.steps.rules.folding import folded

piece = st.one_of(
    st.sampled_from(["oak ", "Oak", " ", "\n", "\u00a0", "_", "-", "2+2", "?", "\u2019", "\u2026", "$", "#1"]),
    st.sampled_from(["caf\u00e9 ", "CAF\u00c9", "e\u0301", "\u0301", "\u00df", "\ufb01", "\u03a3", "\u6771"]),
    st.sampled_from(["\U0001f600\ufe0f", "\u200b", "\xad"]),
    st.text(max_size=2),
)  # fmt: skip
texts = st.lists(st.lists(piece, max_size=6).map("".join), max_size=6)


def by_definition(texts: list[str]) -> list[str]:
    return _folded(texts).to_list()


def _folded(texts: list[str]) -> pl.Series:
    return pl.DataFrame({"text": texts}, schema={"text": pl.String}).select(folded(pl.col("text"))).to_series()


@given(texts)
@example(["!", "?", "", "- -", "-  -", "--", "\u3002", "\u2014"])
def test_a_column_has_the_hashes_of_its_folded_texts(texts: list[str]) -> None:
    hashes, _ = hashes_and_words(pl.Series(texts, dtype=pl.String))
    assert hashes.tolist() == number_hashes(_folded(texts)).tolist()


@given(texts, st.data())
@example(["a b c d", "A, b! C"], None)
def test_the_share_of_words_in_common(texts: list[str], data: st.DataObject | None) -> None:
    others = data.draw(st.permutations(texts)) if data else texts[::-1]
    (_, some), (_, more) = (hashes_and_words(pl.Series(side, dtype=pl.String)) for side in (texts, others))
    words = [[set(text.split(" ")) - {""} for text in by_definition(side)] for side in (texts, others)]
    expected = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in zip(*words, strict=True)]
    assert alike(some, more, len(texts)).tolist() == expected
    assert alike(some, some, len(texts)).tolist() == [1.0] * len(texts)


@pytest.mark.parametrize(
    "text", ["Don\u2019t \u2013 \u201cwait\u201d\u2026 \U0001f600", "- un caf\u00e9, \u00c0 bient\u00f4t", "2 + 2"]
)
def test_ordinary_text_needs_no_look_at_the_single_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_data.steps.answers.folded", lambda text: pl.lit("other"))
    expected = number_hashes(_folded([text])).tolist()
    assert hashes_and_words(pl.Series([text]))[0].tolist() == expected
    assert hashes_and_words(pl.Series(["\u03a3"]))[0].tolist() == number_hashes(pl.Series(["other"])).tolist()


def test_characters_beyond_ascii_are_what_they_are_taken_for() -> None:
    marks = {point for first, last in MARKS for point in range(first, last + 1)}
    others = {point for first, last in TAME for point in range(first, last + 1)} - marks
    assert set(by_definition([f"a{chr(point)}b" for point in marks])) == {"a b"}
    assert by_definition([f"a{chr(point)}b" for point in others]) == [f"a{chr(point).lower()}b" for point in others]
