"""What a page tells of judged answers: who wins, by how much, and nothing that data could run."""

from typing import Any

from orpo_data.pages.evaluation import evaluation_page

HOSTILE = "</b><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='x' {{ 7*7 }}"


def model(name: str, rewards: list[list[float]]) -> dict[str, Any]:
    return {
        "name": name,
        "reward": {"mean": 0.5, "deviation": 0.25},
        "characters": {"mean": 1234.4, "median": 1000.0},
        "tokens": 300.0,
        "unended": 0.125,
        "distinct_1": {"within": 0.5, "across": 0.25},
        "distinct_2": {"within": None, "across": 0.75},
        "distinct_3": {"within": None, "across": None},
        "similarity": None,
        "rewards": rewards,
    }


def evaluation(text: str = "judge", against: bool = True, again: bool = False) -> dict[str, Any]:
    models = {"model": model(text, [[0.5, 1.0], [-0.5, 1.0]])}
    if against:
        models["against"] = model("base", [[0.0, 1.0], [0.0, 0.5]])
    judged = {role: {"answer": text, "reward": 0.5} for role in models}
    rate = {
        "mean": 0.625,
        "deviation": 0.177,
        "error": 0.125,
        "seeds": [0.75, 0.5],
        "ties": 0.25,
        "length_controlled": 0.55,
    }
    return {
        "model": text,
        "base_model": None,
        "dataset": "d",
        "pairs": 2,
        "before": None,
        "after": {"pair_accuracy": 0.5},
        "per_pair": {"before_margin": None, "after_margin": [1.0, -1.0], "after_probability_ratio": [0.5, -0.5]},
        "samples": [],
        "judge": {
            "reward_model": text,
            "tokenized_again": again,
            "prompts": 2,
            "settings": {"seeds": [1, 5], "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 256},
            "pair_accuracy": 0.75,
            "pairs": {"chosen": [1.0, 2.0], "rejected": [0.0, 1.0]},
            "win_rate": rate | {"longer_wins": 0.6} if against else None,
            "models": models,
            "examples": [{"id": "x", "prompt": text} | judged],
        },
    }


def test_who_wins(read_page):
    text = read_page(evaluation_page(evaluation())).words
    assert "Answers, judged by judge" in text
    assert "Prompts 2 Seeds 2 Win rate 62.5 ± 17.7 % At equal length 55.0 % Judge's pair accuracy 75.0 %" in text
    assert (
        "by seed, whose standard deviation is the ± above: 1: 75.0 %, 5: 50.0 %. Its standard error over the choice of "
        "prompts is 12.5 points. The longer answer wins in 60.0 %"
    ) in text
    assert "25.0 % are ties" in text
    assert "0.5 ± 0.25 0.5 ± 0.25 Characters mean length of an answer 1,234 1,234" in text
    assert "0.5 / 0.25" in text
    assert "of two words in a row - / 0.75 - / 0.75" in text
    assert "tokenized again" not in text
    assert "tokenized again" in read_page(evaluation_page(evaluation(again=True))).words
    assert "log odds ratio" in text
    assert "Similarity" not in text
    alike = evaluation()
    for told in alike["judge"]["models"].values():
        told["similarity"] = {"within": 0.875, "across": 0.5}
    assert "lower is more diverse 0.875 / 0.5 0.875 / 0.5" in read_page(evaluation_page(alike)).words


def test_models_of_one_name_are_told_apart(read_page):
    result = evaluation()
    result["judge"]["models"]["against"]["name"] = "judge"
    assert "Win rates of model over against" in read_page(evaluation_page(result)).words


def test_a_model_alone(read_page):
    text = read_page(evaluation_page(evaluation(against=False))).words
    assert "Win rate" not in text
    assert "wins" not in text
    assert "0.5 ± 0.25" in text


def test_it_is_harmless(read_page):
    page = evaluation_page(evaluation(HOSTILE))
    read_page(page).assert_harmless()
    assert "<script" not in page
    assert HOSTILE in read_page(page).text
