"""Draws belong to a row."""

import hashlib

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.steps.draws import draw, draws, uniform, uniforms


def test_a_draw_by_hand():
    # the first 8 bytes of the sha256 of "42", unit separator, "binarize", unit separator, "ab"
    assert draw(42, "binarize", "ab") == int(hashlib.sha256(b"42\x1fbinarize\x1fab").hexdigest()[:16], 16)


@given(st.integers(), st.text(st.characters(codec="utf-8")), st.lists(st.text(st.characters(codec="utf-8"))))
def test_many_draws_are_each_of_them(seed, name, keys):
    column = pl.Series(keys, dtype=pl.String)
    assert draws(seed, name, column).tolist() == [draw(seed, name, key) for key in keys]
    assert uniforms(seed, name, column).tolist() == [uniform(seed, name, key) for key in keys]
    assert all(0 <= uniform(seed, name, key) < 1 for key in keys)
