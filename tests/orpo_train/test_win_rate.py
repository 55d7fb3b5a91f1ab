"""Win rates: ties by half, their spread, and what length has to do with them."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_train import win_rate
from orpo_train.win_rate import error_over_prompts, length_controlled, longer_wins, outcomes, spread

COMPARISONS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-900, 900)), min_size=1, max_size=40)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(win_rate).failed == 0


@given(rewards=st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1))
def test_wins_and_losses_of_both_sides_make_one(rewards: list[tuple[int, int]]) -> None:
    ours, theirs = np.array(rewards, float).T
    assert outcomes(ours, theirs) + outcomes(theirs, ours) == pytest.approx(1)
    assert outcomes(ours, ours) == pytest.approx(0.5)


def test_spread_by_hand() -> None:
    """Deviations -1, 0, 1: squares sum to 2, over n - 1 = 2 that is 1."""
    assert spread(np.array([1.0, 2.0, 3.0])) == 1.0
    assert spread(np.array([1.0])) is None


def test_error_over_prompts_by_hand() -> None:
    """Prompts' means .5, 1, 0, .5: their deviation is sqrt(.5 / 3), over sqrt(4)."""
    scores = np.array([[1.0, 1.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.5]])
    assert error_over_prompts(scores) == pytest.approx(np.sqrt(0.5 / 3) / 2)
    assert error_over_prompts(np.array([[1.0], [0.0]])) is None


def test_longer_wins_by_hand() -> None:
    """Ours is longer and wins, longer and ties, shorter and loses, shorter and wins; the fifth is as long."""
    scores, lengths = np.array([1, 0.5, 0, 1, 1]), np.array([3, 2, -4, -1, 0])
    assert longer_wins(scores, lengths) == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert longer_wins(np.array([1.0]), np.array([0.0])) is None


@given(comparisons=COMPARISONS)
def test_the_other_side_has_the_rest(comparisons: list[tuple[float, int]]) -> None:
    scores, lengths = np.array(comparisons, float).T
    both = length_controlled(scores, lengths) + length_controlled(1 - scores, -lengths)
    assert both == pytest.approx(1, abs=1e-6)
    assert 0 <= length_controlled(scores, lengths) <= 1


@given(comparisons=COMPARISONS)
def test_where_length_tells_nothing_the_win_rate_stays(comparisons: list[tuple[float, int]]) -> None:
    """Every outcome happened once with the longer and once with the shorter answer; or all are equally long."""
    scores, lengths = np.array(comparisons, float).T
    balanced = length_controlled(np.tile(scores, 2), np.concatenate([lengths, -lengths]))
    assert balanced == pytest.approx(scores.mean(), abs=1e-6)
    assert length_controlled(scores, np.zeros_like(lengths)) == pytest.approx(scores.mean())


def test_a_judge_of_length_alone_finds_equal_lengths_equal() -> None:
    """Our answers are mostly longer, and win for that alone: of two thirds nothing is left."""
    random = np.random.default_rng(0)
    lengths = random.normal(200, 300, 5000)
    scores = (random.random(5000) < 1 / (1 + np.exp(-2 * np.tanh(lengths / 300)))).astype(float)
    assert scores.mean() > 0.63
    assert length_controlled(scores, lengths) == pytest.approx(0.5, abs=0.03)


def test_the_regression_is_solved() -> None:
    """The documented loss, put down by plain steps: log-likelihood with tanh of the scaled lengths, ridge 0.01."""
    random = np.random.default_rng(1)
    lengths = np.append(random.normal(50, 100, 30), [4000.0, -900.0])
    scores = (random.random(32) < 1 / (1 + np.exp(-lengths / 60 + 1))).astype(float)
    features = np.stack([np.ones(32), np.tanh(lengths / lengths.std())], axis=1)
    weights = np.zeros(2)
    for _ in range(20_000):
        expected = 1 / (1 + np.exp(-features @ weights))
        weights += 0.1 * (features.T @ (scores - expected) - np.array([0.0, 0.01]) * weights)
    assert length_controlled(scores, lengths) == pytest.approx(1 / (1 + np.exp(-weights[0])), abs=1e-6)


def test_length_that_decides_everything_keeps_the_rate_finite() -> None:
    """The longer answer always wins: any slope is too small for that."""
    lengths = np.array([100.0, 120, 80, -100] * 25)
    assert 0.5 < length_controlled((lengths > 0).astype(float), lengths) < 0.75


def test_what_does_not_depend_on_length_survives() -> None:
    """Lengths and outcomes drawn independently, won in 70 %."""
    random = np.random.default_rng(0)
    lengths, scores = random.normal(200, 300, 5000), (random.random(5000) < 0.7).astype(float)
    assert length_controlled(scores, lengths) == pytest.approx(0.7, abs=0.02)
