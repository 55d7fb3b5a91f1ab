"""Distributions as plain SVG: staircases over shared bins."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_data.steps.tokens import ordered

CHART_WIDTH, CHART_HEIGHT = 520, 130
BINS = 40

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Histogram:
    """One or more distributions over the same bins, in the coordinates of the drawing."""

    areas: dict[str, str]  # name of a series -> its outline as an SVG path
    ticks: list[tuple[float, str]]  # place on the x axis, label
    zero: float | None  # where 0 lies, if it is inside
    peak: int  # values in the fullest bin
    summary: dict[str, dict[str, float]]  # name of a series -> its median, 95th percentile and maximum
    left_out: int = 0  # values that are not finite


def length_histogram(series: Mapping[str, Numbers]) -> Histogram | None:
    """Lengths (whole numbers >= 0) over a logarithmic axis, because they are heavy-tailed; None if there are none."""
    values = np.concatenate(list(series.values()))
    if not len(values):
        return None
    low, high = int(values.min()), int(values.max()) + 1
    edges = np.unique(np.round(np.expm1(np.linspace(np.log1p(low), np.log1p(high), BINS + 1))))
    marks = [digit * 10**power for power in range(len(str(high))) for digit in (1, 2, 5)]
    inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) > 7:
        inside = [mark for mark in inside if str(mark)[0] == "1"]
    return _draw(series, edges, [(mark, f"{mark:,}") for mark in inside or sorted({low, high - 1})], np.log1p)


def value_histogram(series: Mapping[str, Sequence[float | None] | Numbers]) -> Histogram | None:
    """Real numbers over a linear axis with 0 between two bins; None if none is finite."""
    everything = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    finite = {name: values[np.isfinite(values)] for name, values in everything.items()}
    values = np.concatenate(list(finite.values()))
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    width = round_step(max(high - low, 1e-6 * max(-low, high), 1e-3), BINS)  # wide enough for distinct edges
    first, last = math.floor(low / width), math.floor(high / width) + 1
    first, last = first - (width * first > low), last + (width * last < high)  # where the division rounded
    edges = width * np.arange(first, last + 1)
    step = round_step(float(edges[-1] - edges[0]), 8)
    marks = [step * n for n in range(math.ceil(edges[0] / step), math.floor(edges[-1] / step) + 1)]
    left_out = sum(map(len, everything.values())) - len(values)
    return _draw(finite, edges, [(mark, f"{mark:g}") for mark in marks], lambda value: value, left_out)


def round_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5 x 10^n that divides `span` into at most `most` parts."""
    power: float = 10.0 ** math.floor(math.log10(span / most))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power * most >= span * (1 - 1e-9))


def _draw(
    series: Mapping[str, Numbers],
    edges: Numbers,
    ticks: Sequence[tuple[float, str]],
    scale: Callable[[Any], Any],
    left_out: int = 0,
) -> Histogram:
    low, high = scale(edges[0]), scale(edges[-1])

    def place(value: Any) -> Any:
        return (scale(value) - low) / (high - low) * CHART_WIDTH

    in_order = {name: ordered(values) for name, values in series.items()}  # once, for counts and summary
    counts = {name: _counts(values, edges) for name, values in in_order.items()}
    peak = max(int(count.max()) for count in counts.values())
    return Histogram(
        areas={name: _outline(place(edges), count / peak * CHART_HEIGHT) for name, count in counts.items()},
        ticks=[(float(place(value)), label) for value, label in ticks],
        zero=float(place(0)) if edges[0] < 0 < edges[-1] else None,
        peak=peak,
        summary={name: _summary(values) for name, values in in_order.items() if len(values)},
        left_out=left_out,
    )


def _counts(values: Numbers, edges: Numbers) -> Numbers:
    """How many of the sorted values lie from each edge to the next; the last edge belongs to the bin before it."""
    return np.diff(np.append(values.searchsorted(edges[:-1]), values.searchsorted(edges[-1], "right")))


def _outline(edges: Numbers, heights: Numbers) -> str:
    """A filled staircase: up and along for every bin, then down to the axis."""
    steps = [f"V{CHART_HEIGHT - height:.1f}H{right:.1f}" for right, height in zip(edges[1:], heights, strict=True)]
    return f"M{edges[0]:.1f},{CHART_HEIGHT}{''.join(steps)}V{CHART_HEIGHT}Z"


def _summary(values: Numbers) -> dict[str, float]:
    median, high = np.percentile(values, [50, 95])
    return {"median": float(median), "95 %": float(high), "max": float(values[-1])}
