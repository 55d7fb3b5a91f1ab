"""The page of an evaluation: what became better, and nothing that data could run."""

import re
from typing import Any

from orpo_data.pages.evaluation import evaluation_page

HOSTILE = "</b><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='x' {{ 7*7 }}"


def evaluation(before: bool = True, text: str = "text") -> dict[str, Any]:
    metrics = {"log_odds_ratio": 0.5, "pair_accuracy": 0.75, "nll": 2.0, "logps_rejected": -3.0, text: 1.0}
    earlier = {"log_odds_ratio": 0.25, "pair_accuracy": 0.5, "nll": 1.5, "logps_rejected": -3.0, text: 2.0}
    return {
        "model": text,
        "base_model": text if before else None,
        "dataset": text,
        "pairs": 1234,
        "before": earlier if before else None,
        "after": metrics,
        "per_pair": {"before_margin": [-1.0, 1.0, -1.0] if before else None, "after_margin": [1.0, 1.0, 2.0]},
        "samples": [{"prompt": text, "chosen": text, "before": text if before else None, "after": text}],
    }


def test_evaluation_says_what_became_better(read_page):
    text = read_page(evaluation_page(evaluation())).words
    assert "Pairs 1,234 Pair accuracy 75.0 % Log odds ratio 0.5000 Newly right 2 Newly wrong 0" in text
    assert re.search(r"Log odds ratio [^✓✗]* 0.2500 0.5000 \+0.2500 ✓ better", text)
    assert re.search(r"Pair accuracy [^✓✗]* 50.0 % 75.0 % \+25.0 points ✓ better", text)
    assert re.search(r"NLL [^✓✗]* 1.5000 2.0000 \+0.5000 ✗ worse", text)
    assert re.search(r"-3.0000 -3.0000 \+0.0000 text 2.0000 1.0000 -1.0000 How", text)  # no change, no known direction


def test_evaluation_without_a_before(read_page):
    text = read_page(evaluation_page(evaluation(before=False))).words
    assert "before" not in text.lower()
    assert "NLL negative log-likelihood of the chosen answer 2.0000" in text


def test_evaluation_is_harmless_and_reproducible(read_page):
    page = evaluation_page(evaluation(text=HOSTILE))
    read_page(page).assert_harmless()
    assert "<script" not in page
    assert HOSTILE in read_page(page).text
    assert page == evaluation_page(evaluation(text=HOSTILE))


def test_evaluation_without_samples_or_finite_margins():
    result = {**evaluation(before=False), "samples": []}
    result["per_pair"]["after_margin"] = [None]
    page = evaluation_page(result)
    assert "<svg" not in page
    assert "Sample answers" not in page


def test_courses_over_the_training(read_page):
    lines = [
        {
            "step": step,
            "eval/logps/chosen": -3.0 + step,
            "eval/logps/rejected": -3.0,
            "eval/log_odds_chosen": 0.1 * step,
        }
        for step in (0, 1)
    ]
    page = evaluation_page({**evaluation(), "training": lines})
    assert "Over the training Log probability of a token" in read_page(page).words
    assert page.count('class="curve c-chosen"') == page.count('class="curve c-rejected"') == 1
    assert page.count('class="curve c-after"') == 1
    for none in ({}, {"training": lines[1:]}):  # the evaluation at the end alone is no course
        assert "Over the training" not in evaluation_page(evaluation() | none)


def test_scores_are_drawn_where_there_are_no_log_probabilities(read_page):
    """TRL's implicit rewards of a language model are its log-probabilities over again."""

    def lines(**figures: float):
        rewards = {"eval/rewards/chosen": 0.5, "eval/rewards/rejected": 0.1}
        return [{"step": step, **rewards, **figures} for step in (0, 1)]

    reward_model = evaluation_page({**evaluation(), "training": lines()})
    assert "Score" in read_page(reward_model).words
    language_model = evaluation_page({**evaluation(), "training": lines(**{"eval/logps/chosen": -1.0})})
    assert "Score" not in read_page(language_model).words
