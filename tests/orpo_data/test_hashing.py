"""Hashes of a column are those of its texts."""

import hashlib

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.hashing import hex_hashes, leading_bits, number_hashes


@given(st.lists(st.text() | st.text(min_size=200, max_size=3000)))
def test_a_column_has_the_sha256_of_each_text(texts: list[str]) -> None:
    column = pl.Series(texts, dtype=pl.String)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    for given_as in (column, column.cast(pl.Binary)):
        assert hex_hashes(given_as).to_list() == [digest[:32] for digest in digests]
        assert number_hashes(given_as).tolist() == [int(digest[:16], 16) for digest in digests]


@pytest.mark.parametrize("digits", ["0" * 32, "f" * 32, "8" + "0" * 31, "7" + "f" * 31])
def test_leading_bits_at_their_ends(digits: str) -> None:
    assert leading_bits(pl.Series([digits])).tolist() == [int(digits[:16], 16)]


def test_a_hash_by_hand() -> None:
    """FIPS 180-4's example: the hash of "abc"."""
    assert hex_hashes(pl.Series(["abc"])).to_list() == ["ba7816bf8f01cfea414140de5dae2223"]
