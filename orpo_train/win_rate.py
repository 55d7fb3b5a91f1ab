"""How often one model's answers win over another's, and how far length alone would explain that."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
RIDGE = 0.01


def outcomes(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> Array:
    """Of each comparison of two rewards 1 for a win of ours, 0 for a loss, a half for a tie; same shape.

    >>> outcomes([2.0, 1.0, 3.0], [1.0, 1.0, 4.0]).tolist()
    [1.0, 0.5, 0.0]
    """
    scores: Array = (np.sign(np.subtract(ours, theirs)) + 1) / 2
    return scores


def spread(values: Array) -> float | None:
    """Standard deviation of a sample (n - 1); None of a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def error_over_prompts(scores: Array) -> float | None:
    """Standard error of the mean of `scores`, [seeds, prompts], for other prompts of the same kind; None of one."""
    prompts = scores.mean(axis=0)
    deviation = spread(prompts)
    return None if deviation is None else float(deviation / np.sqrt(len(prompts)))


def longer_wins(scores: Array, lengths: Array) -> float | None:
    """How often the longer answer wins, of the comparisons whose answers differ in length; None if none do.

    `lengths` holds our answer's length minus theirs; both are [comparisons].
    """
    differ = lengths != 0
    return float(np.where(lengths > 0, scores, 1 - scores)[differ].mean()) if differ.any() else None


def length_controlled(scores: Array, lengths: Array) -> float:
    """The win rate that is expected between answers of equal length, from `scores` and `lengths` as in `longer_wins`.

    A logistic regression of the outcome on tanh(length difference / its standard deviation), read where the difference
    is 0 (arXiv 2404.04475, without its term for the difficulty of an instruction). A small ridge on the slope keeps it
    finite where length decides everything.
    """
    mean, deviation = float(scores.mean()), float(lengths.std())
    if mean in (0.0, 1.0) or deviation == 0:
        return mean
    features = np.stack([np.ones_like(lengths), np.tanh(lengths / deviation)], axis=1)  # [comparisons, 2]
    ridge, weights = np.diag([0.0, RIDGE]), np.zeros(2)
    for _ in range(100):  # Newton's method
        expected = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (scores - expected) - ridge @ weights
        curvature = (features.T * (expected * (1 - expected))) @ features + ridge
        step = np.linalg.solve(curvature, gradient)
        weights += step / max(1.0, float(np.abs(step).max()))  # no step is longer than 1: none goes astray
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))
