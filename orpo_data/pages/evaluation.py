"""The page of an evaluation: a model on held-out pairs, before and after training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orpo_data.pages.charts import Histogram, value_histogram
from orpo_data.pages.judged import judged_view
from orpo_data.pages.lines import LineChart, line_chart
from orpo_data.pages.render import render

METRICS = {  # name -> label, what it is, and whether more (+1) or less (-1) is better
    "pair_accuracy": ("Pair accuracy", "share of pairs whose chosen answer has the higher log probability", 1),
    "margin": ("Margin", "mean of log P(chosen) - log P(rejected)", 1),
    "log_odds_ratio": ("Log odds ratio", "mean of log odds(chosen) - log odds(rejected)", 1),
    "nll": ("NLL", "negative log-likelihood of the chosen answer", -1),
    "logps_chosen": ("log P(chosen)", "log probability of a token of the chosen answer, mean over the pairs", 1),
    "logps_rejected": ("log P(rejected)", "log probability of a token of the rejected answer, mean over the pairs", 0),
}
REWARD_METRICS = {
    "pair_accuracy": ("Pair accuracy", "share of pairs whose chosen answer has the higher score", 1),
    "margin": ("Margin", "mean of score(chosen) - score(rejected)", 1),
    "loss": ("Loss", "mean of -log sigmoid(margin): the surprise at what was preferred", -1),
    "calibration_error": ("Calibration error", "|accuracy - confidence| over bins of sigmoid(|margin|)", -1),
    "score_chosen": ("Score of chosen", "mean over the pairs; scores have no zero point", 0),
    "score_rejected": ("Score of rejected", "mean over the pairs", 0),
}
HEADLINES = ("Pair accuracy", "Log odds ratio", "Calibration error")


@dataclass(frozen=True)
class _MetricRow:
    label: str
    meaning: str
    before: float | None
    after: float
    direction: int  # +1 more is better, -1 less is better, 0 neither
    percent: bool

    @property
    def change(self) -> float | None:
        return None if self.before is None else self.after - self.before

    @property
    def verdict(self) -> str:
        gain = self.direction * (self.change or 0.0)
        return "better" if gain > 0 else "worse" if gain < 0 else ""

    def text(self, value: float | None, sign: str = "") -> str:
        if value is None:
            return "-"
        if self.percent:
            return f"{100 * value:{sign}.1f} {'points' if sign else '%'}"
        return f"{value:{sign}.4f}"


def evaluation_page(result: Mapping[str, Any]) -> str:
    """An evaluation as one self-contained HTML page.

    `result` has model, base_model (or None), dataset and pairs; `before` (or None) and `after`, each metric -> value;
    `per_pair` with before_margin (or None) and after_margin, the log odds of chosen over rejected for each pair; and
    `samples` of prompt, chosen, before (or None) and after.
    `training`, if there, are the evaluations during the run, lines of its metrics.jsonl.
    `judge`, if there, is what a reward model said of answers (see pages/judged.py).
    A reward model's result has `kind` reward; its margins are those of scores, and `calibration` has bins of pairs,
    confidence and accuracy.
    """
    before, after = result["per_pair"].get("before_margin"), result["per_pair"]["after_margin"]
    known = REWARD_METRICS if result.get("kind") == "reward" else METRICS
    metrics = [_metric_row(name, known, result) for name in _metric_names(result["after"], known)]
    return render(
        "evaluation.html.jinja",
        title=f"Evaluation of {result['model']}",
        result=result,
        metrics=metrics,
        headlines=[(metric.label, metric.text(metric.after)) for metric in metrics if metric.label in HEADLINES],
        chart_data=value_histogram({"after": after} if before is None else {"before": before, "after": after}),
        calibration=result.get("calibration"),
        unit="score" if known is REWARD_METRICS else "log odds",
        flips=_flips(before, after) if before is not None else None,
        ratios=_ratios(result["per_pair"]),
        courses=_courses(result.get("training") or []),
        judged=judged_view(result["judge"]) if "judge" in result else None,
    )


Known = Mapping[str, tuple[str, str, int]]


def _metric_names(metrics: Mapping[str, float], known: Known) -> list[str]:
    first = [name for name in known if name in metrics]
    return first + [name for name in metrics if name not in known]


def _metric_row(name: str, known: Known, result: Mapping[str, Any]) -> _MetricRow:
    label, meaning, direction = known.get(name, (name, "", 0))
    before = (result["before"] or {}).get(name)
    return _MetricRow(label, meaning, before, result["after"][name], direction, percent=name == "pair_accuracy")


def _flips(before: list[float], after: list[float]) -> dict[str, int]:
    """Pairs whose preferred side changed."""
    was, now = np.asarray(before, dtype=float) > 0, np.asarray(after, dtype=float) > 0
    return {"won": int((~was & now).sum()), "lost": int((was & ~now).sum())}


def _ratios(per_pair: Mapping[str, Any]) -> Histogram | None:
    """The two ratios that a preference can be read from: odds pull further apart than probabilities do."""
    if "after_probability_ratio" not in per_pair:
        return None
    odds, probability = per_pair["after_margin"], per_pair["after_probability_ratio"]
    return value_histogram({"log odds ratio": odds, "log probability ratio": probability})


COURSES = {
    "Log probability of a token": {"chosen": "eval/logps/chosen", "rejected": "eval/logps/rejected"},
    "Log odds ratio": {"chosen over rejected": "eval/log_odds_chosen"},
    "Score": {"chosen": "eval/rewards/chosen", "rejected": "eval/rewards/rejected"},
}


def _courses(lines: Sequence[Mapping[str, Any]]) -> dict[str, LineChart]:
    """Curves over optimizer steps, at least two of them; scores are drawn where there are no log probabilities."""
    charts: dict[str, LineChart] = {}
    if len(lines) < 2:
        return charts
    for title, metrics in COURSES.items():
        series = {
            name: [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
            for name, metric in metrics.items()
        }
        if (chart := line_chart(series)) and not (title == "Score" and charts):
            charts[title] = chart
    return charts
