"""Whole numbers in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from orpo_data.steps.tokens import among, distinct, ordered

UNSIGNED = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3)).map(lambda values: np.array(values, np.uint64))
SIGNED = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 2)).map(lambda values: np.array(values, np.int64))


@given(UNSIGNED | SIGNED)
def test_ordered(values: NDArray[np.generic]) -> None:
    found = ordered(values)
    assert (found.dtype, found.tolist()) == (values.dtype, sorted(values.tolist()))


@given(UNSIGNED | SIGNED)
def test_distinct(values: NDArray[np.generic]) -> None:
    found = distinct(values)
    assert (found.dtype, found.tolist()) == (values.dtype, sorted({*values.tolist()}))


@pytest.mark.parametrize("kind", [UNSIGNED, SIGNED])
@given(st.data())
def test_among(kind: st.SearchStrategy[NDArray[np.generic]], data: st.DataObject) -> None:
    values, known = data.draw(kind), data.draw(kind)
    assert among(values, distinct(known)).tolist() == [value in {*known.tolist()} for value in values.tolist()]
