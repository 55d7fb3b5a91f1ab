"""The page of a comparison of training methods: who wins, what each learned, what it cost, what it is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from orpo_data.pages.charts import value_histogram
from orpo_data.pages.lines import LineChart, line_chart
from orpo_data.pages.render import figure, render

HELD_OUT = {
    "accuracy": "share of pairs whose chosen answer is the likelier one; under DPO: gained more on its reference",
    "log odds ratio": "log odds of chosen minus log odds of rejected",
    "logps chosen": "log probability of a token of the chosen answer",
    "logps rejected": "log probability of a token of the rejected answer",
}
ANSWERS = {
    "reward": "the judge's score",
    "characters": "mean length of an answer; judges like length",
    "cut off, %": "answers that reached the most new tokens",
    "distinct-1": "share of all words that are distinct; falls with length",
    "distinct-2": "of two words in a row",
}
MOST_SERIES = 6  # colours that the page has


def methods_page(comparison: Mapping[str, Any]) -> str:
    """A comparison (comparison.json as a value) as one self-contained HTML page."""
    labels = [row["label"] for row in comparison["held_out"]]
    colours = {label: f"method-{number % MOST_SERIES + 1}" for number, label in enumerate(labels)}
    return render(
        "methods.html.jinja",
        title=f"{comparison['name']}: comparison of {len(labels)} methods",
        comparison=comparison,
        held_out=HELD_OUT,
        answers=ANSWERS,
        answered={row["label"]: _answer_cells(row) for row in comparison["answers"]},
        colours=colours,
        logps=_logp_charts(comparison["curves"]),
        ratios=line_chart(
            {label: _points(lines, "eval/log_odds_chosen") for label, lines in comparison["curves"].items()}
        ),
        rewards=value_histogram({row["label"]: row["rewards"] for row in comparison["answers"]})
        if comparison["answers"]
        else None,
        odds=_odds_chart(comparison),
        spread=spread,
        hundredfold=hundredfold,
        seconds=_seconds,
        mebibytes=lambda value: value / 2**20,
    )


def spread(value: Mapping[str, Any] | None, digits: int = 4, scale: float = 1.0) -> str:
    """Mean ± standard deviation over the seeds; a dash where there is none.

    >>> spread({"mean": 0.5, "sd": 0.125, "n": 2}, 3), spread({"mean": 0.5, "sd": None, "n": 1}, 3)
    ('0.5 ± 0.125', '0.5')
    """
    if value is None:
        return "-"
    mean = figure(scale * value["mean"], digits)
    return mean if value["sd"] is None else f"{mean} ± {figure(scale * value['sd'], 2)}"


def _answer_cells(row: Mapping[str, Any]) -> list[str]:
    """What there is to say of a method's answers, in the order of ANSWERS."""
    shares = (row["distinct_1"], row["distinct_2"])
    diversity = [f"{spread(share['within'], 3)}\n{spread(share['across'], 3)} across" for share in shares]
    return [spread(row["reward"], 3), spread(row["characters"], 3), spread(row["unended"], 3, 100), *diversity]


def hundredfold(value: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    return figure(None if value is None else 100 * value, 3)


def _seconds(value: float) -> str:
    """
    >>> _seconds(42.4), _seconds(200), _seconds(7325)
    ('42 s', '3 min 20 s', '2 h 2 min')
    """
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _points(lines: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    return [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]


def _logp_charts(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, LineChart]:
    """Log-probabilities of chosen and rejected over the steps of each method, on the same y axis."""
    sides = {
        label: {side: _points(lines, f"eval/logps/{side}") for side in ("chosen", "rejected")}
        for label, lines in curves.items()
    }
    charts = {}
    for label, series in sides.items():
        steps = [x for points in series.values() for x, _ in points]
        others = {
            f"{other}/{side}": [(steps[0], y) for _, y in points]
            for other, both in sides.items()
            for side, points in both.items()
            if steps
        }
        if chart := line_chart(series, others=others):
            charts[label] = chart
    return charts


def _odds_chart(comparison: Mapping[str, Any]) -> Any:
    """Log odds ratio and log probability ratio of the held-out pairs under ORPO: the paper's picture of the two."""
    ratios = comparison["ratios"]
    if not ratios:
        return None
    return value_histogram({"log odds ratio": ratios["odds"], "log probability ratio": ratios["probability"]})
