"""Curves over steps as plain SVG: several series on one pair of axes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orpo_data.pages.charts import CHART_HEIGHT, CHART_WIDTH, round_step

Points = Sequence[tuple[float, float]]
"""(step, value), in the order of the steps."""


@dataclass(frozen=True)
class LineChart:
    """Curves in the coordinates of the drawing."""

    paths: dict[str, str]  # name of a series -> its line as an SVG path
    dots: dict[str, list[tuple[float, float]]]  # name of a series -> its points
    x_ticks: list[tuple[float, str]]  # place, label
    y_ticks: list[tuple[float, str]]
    zero: float | None  # where 0 lies on the y axis, if it is inside


def line_chart(series: Mapping[str, Points], *, others: Mapping[str, Points] | None = None) -> LineChart | None:
    """Values over steps, on axes that hold `others` too, so that two charts can be compared; None without points."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    known = [point for points in (*finite.values(), *(others or {}).values()) for point in points]
    known = [(x, y) for x, y in known if math.isfinite(y)]
    if not known:
        return None
    left, right = min(x for x, _ in known), max(x for x, _ in known)
    low, high = min(y for _, y in known), max(y for _, y in known)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - left) / max(right - left, 1) * CHART_WIDTH, (high - y) / (high - low) * CHART_HEIGHT

    placed = {name: [place(x, y) for x, y in points] for name, points in finite.items() if points}
    return LineChart(
        paths={name: "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points) for name, points in placed.items()},
        dots=placed,
        x_ticks=[(place(mark, low)[0], f"{mark:,.0f}") for mark in _marks(left, max(right, left + 1), whole=True)],
        y_ticks=[(place(left, mark)[1], f"{mark:g}") for mark in _marks(low, high)],
        zero=place(left, 0.0)[1] if low < 0 < high else None,
    )


def _marks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round values between two ends, about five."""
    step = round_step(high - low, 5)
    step = max(1.0, step) if whole else step
    return [round(step * n, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
