"""Distributions as staircases: nothing outside the drawing, areas that are the counts."""

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.pages.charts import _counts, length_histogram, value_histogram


def areas(path: str) -> float:
    """Area under a staircase `M x,base V y H x ... V base Z`, by hand."""
    x, total = float(re.match(r"M([-\d.]+)", path)[1]), 0.0
    for y, right in re.findall(r"V([\d.]+)H([\d.]+)", path):
        total += (130 - float(y)) * (float(right) - x)
        x = float(right)
    return total


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_every_length_is_inside_the_chart(lengths):
    chart = length_histogram({"prompt": np.array(lengths)})
    assert 1 <= chart.peak <= len(lengths)
    assert chart.ticks
    assert all(0 <= x <= 520 for x, _ in chart.ticks)
    assert chart.summary["prompt"]["max"] == max(lengths)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.lists(st.floats(-1e6, 1e6)))
@example([0.0], [])
@example([0.0, 5e-324], [])
@example([1e6, 1e6 + 1e-9], [])
def test_every_margin_is_inside_the_chart(before, after):
    chart = value_histogram({"before": before, "after": after})
    assert chart.areas["before"].count("H") <= 42
    assert areas(chart.areas["before"]) > 0
    assert 1 <= chart.peak <= len(before) + len(after)


@given(st.sets(st.integers(0, 20), min_size=2).map(sorted), st.data())
def test_a_value_at_an_edge_counts_as_in_numpy(edges, data):
    """In the bin behind it; the last edge in the one before."""
    values = sorted(data.draw(st.lists(st.integers(edges[0], edges[-1]))))
    expected, _ = np.histogram(values, edges)
    assert _counts(np.array(values, float), np.array(edges, float)).tolist() == expected.tolist()


def test_margins_of_a_hand_worked_chart():
    chart = value_histogram({"after": [-1.0, 1.0, 1.0, float("nan"), None, float("inf")]})
    assert chart.peak == 2
    assert chart.left_out == 3
    assert chart.zero == pytest.approx(1.0 / 2.05 * 520)  # bins of 0.05 from -1 to 1.05, so zero is 20 bins in
    assert {"-1", "0", "1"} <= {label for _, label in chart.ticks}


def test_no_values_no_chart():
    assert length_histogram({"prompt": np.array([], dtype=int)}) is None
    assert value_histogram({"after": [float("nan")]}) is None
