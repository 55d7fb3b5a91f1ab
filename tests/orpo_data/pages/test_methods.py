"""The page of a comparison: its tables and curves, and nothing that a name could run."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.pages.charts import CHART_HEIGHT, CHART_WIDTH
from orpo_data.pages.lines import line_chart
from orpo_data.pages.methods import methods_page, spread

HOSTILE = "</b><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='x' {{ 7*7 }}"
LABELS = ("sft", "orpo lambda=0.1")


def mean(value: float, sd: float | None = None) -> dict[str, Any]:
    return {"mean": value, "sd": sd, "n": 1 if sd is None else 2}


def comparison(text: str = "text", judged: bool = True) -> dict[str, Any]:
    names = ("accuracy", "log odds ratio", "logps chosen", "logps rejected")
    curve = [{"step": step, "eval/logps/chosen": -2.0, "eval/logps/rejected": -3.0} for step in (0, 5)]
    run = {"name": text, "model": text, "lineage": {"weights": "w", "base": text, "base_weights": "b", "dataset": "d"}}
    run["lineage"]["raw"] = [{"name": text, "sha256": "s"}]
    rate = mean(0.625, 0.05) | {"error": 0.065, "equal_length": 0.6}
    times = {"seconds": mean(75), "cpu_seconds": mean(7325), "peak_bytes": None}
    cost = {**times, "steps": mean(3), "tokens": mean(1e6), "forward_passes": mean(48)}
    distinct = {"within": None, "across": mean(0.75, 0.125)}
    answers = {"reward": mean(1.5, 0.5), "characters": mean(120), "unended": mean(0.25), "rewards": [0.0, 1.0, 2.0]}
    answers |= {"distinct_1": distinct, "distinct_2": distinct}
    return {
        "name": text,
        "base_model": text,
        "dataset": "f" * 64,
        "pairs": {"train": 1234, "eval": 56},
        "recipe": {"train": {}, "compare": {"seeds": [1, 2], "draws": 1, "methods": {"ppo": {}, text: {}}}},
        "runs": [run],
        "failed": [{"name": text, "error": text}],
        "held_out": [{"label": label, "runs": 2, **dict.fromkeys(names, mean(0.5, 0.25))} for label in LABELS],
        "reward_models": [{"label": "judge", "accuracy": 0.75}] if judged else [],
        "win_rates": {"orpo lambda=0.1": {"sft": rate, "dpo": None}} if judged else {},
        "answers": [{"label": label, **answers} for label in LABELS] if judged else [],
        "curves": dict.fromkeys(LABELS, curve),
        "ratios": {"label": text, "odds": [1.5, 0.0], "probability": [1.0, 0.0]} if judged else None,
        "costs": [{"label": label, "runs": 2, **cost} for label in LABELS],
    }


def test_the_page_has_every_figure(read_page):
    words = read_page(methods_page(comparison())).words
    assert "Training pairs 1,234 Held-out pairs 56 Seeds 2 Models trained 1 Failed 1" in words
    assert "Win rate, % over sft over dpo orpo lambda=0.1 62.5 ± 5 error over prompts 6.5 at equal length 60 -" in words
    assert "The reward model judge prefers the chosen answer of 75.0 %" in words
    assert "The judge is the reward model that PPO learned from" in words
    assert "sft 0.5 ± 0.25 0.5 ± 0.25 0.5 ± 0.25 0.5 ± 0.25 2" in words
    assert "sft 1 min 15 s 2 h 2 min - 3 1,000,000 48" in words
    assert "Odds against probabilities" in words
    assert "sft 1.5 ± 0.5 120 25 - 0.75 ± 0.12 across - 0.75 ± 0.12 across" in words


def test_without_a_judge_there_are_no_answers(read_page):
    words = read_page(methods_page(comparison(judged=False))).words
    for absent in ("Win rate", "The answers", "Rewards of the answers", "Odds against"):
        assert absent not in words


def test_the_page_is_harmless_and_reproducible(read_page):
    page = methods_page(comparison(text=HOSTILE))
    read_page(page).assert_harmless()
    assert "<script" not in page
    assert page == methods_page(comparison(text=HOSTILE))


def test_spread_of_nothing_one_and_two():
    assert [spread(None), spread(mean(0.5), 3), spread(mean(0.125, 0.01), 3, 100)] == ["-", "0.5", "12.5 ± 1"]


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(-1e6, 1e6)), min_size=1, max_size=5))
def test_curves_stay_inside_the_chart(points):
    chart = line_chart({"a": sorted(points)})
    assert chart is not None
    for x, y in chart.dots["a"]:
        assert -0.1 <= x <= CHART_WIDTH + 0.1
        assert -0.1 <= y <= CHART_HEIGHT + 0.1
    assert len(re.findall(r"[ML]", chart.paths["a"])) == len(points)


def test_what_is_not_finite_is_left_out():
    assert line_chart({"a": [(0, math.nan)]}) is None
    chart = line_chart({"a": [(0, 1.0), (1, math.inf), (2, 3.0)], "b": []})
    assert chart is not None
    assert {name: len(dots) for name, dots in chart.dots.items()} == {"a": 2}


def test_higher_values_lie_higher_and_zero_is_marked():
    chart = line_chart({"a": [(0, -1.0), (10, 1.0)]})
    assert chart is not None
    (left, low), (right, high) = chart.dots["a"]
    assert (left, right) == (0, CHART_WIDTH)
    assert high < low
    assert chart.zero == pytest.approx(CHART_HEIGHT / 2)
    assert [label for _, label in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]
