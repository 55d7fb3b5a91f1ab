"""The part of an evaluation's page that tells what a reward model said of answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from orpo_data.pages.charts import Histogram, value_histogram
from orpo_data.pages.render import figure


@dataclass(frozen=True)
class JudgedView:
    """What the template draws."""

    judge: Mapping[str, Any]
    headlines: list[tuple[str, str]]
    rewards: Histogram | None  # of the models' answers
    pairs: Histogram | None  # of the data's own answers
    measures: list[tuple[str, str, list[str]]]  # label, meaning, a cell for each model

    names: dict[str, str]  # what each model is called -> its role


def judged_view(judge: Mapping[str, Any]) -> JudgedView:
    """`judge` as pipelines/judging.py writes it into evaluation.json."""
    models = judge["models"]
    names = _names(models)
    measures = [measure for measure in MEASURES if measure[0] != "Similarity" or models["model"]["similarity"]]
    return JudgedView(
        judge=judge,
        headlines=_headlines(judge),
        rewards=value_histogram({name: list(chain(*models[role]["rewards"])) for name, role in names.items()}),
        pairs=value_histogram(judge["pairs"]),
        measures=[(label, meaning, [cell(model) for model in models.values()]) for label, meaning, cell in measures],
        names=names,
    )


def _names(models: Mapping[str, Any]) -> dict[str, str]:
    """ "model" and "against" where both are called alike."""
    names = {model["name"]: role for role, model in models.items()}
    return names if len(names) == len(models) else {role: role for role in models}


def _headlines(judge: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [("Prompts", f"{judge['prompts']:,}"), ("Seeds", str(len(judge["settings"]["seeds"])))]
    if rate := judge["win_rate"]:
        deviation = rate["deviation"]
        sure = "" if deviation is None else f" ± {100 * deviation:.1f}"
        lines.append(("Win rate", f"{100 * rate['mean']:.1f}{sure} %"))
        lines.append(("At equal length", f"{100 * rate['length_controlled']:.1f} %"))
    lines.append(("Judge's pair accuracy", f"{100 * judge['pair_accuracy']:.1f} %"))
    return lines


def _reward(model: Mapping[str, Any]) -> str:
    deviation = model["reward"]["deviation"]
    return figure(model["reward"]["mean"]) + ("" if deviation is None else f" ± {figure(deviation, 2)}")


def _both(name: str, model: Mapping[str, Any]) -> str:
    """A measure of diversity within and across prompts."""
    value = model[name]
    return "-" if value is None else f"{figure(value['within'], 3)} / {figure(value['across'], 3)}"


MEASURES = [
    ("Reward", "mean over prompts and seeds, ± standard deviation of the seeds' means", _reward),
    ("Characters", "mean length of an answer", lambda model: f"{model['characters']['mean']:,.0f}"),
    ("Tokens", "mean length, in the model's own tokens", lambda model: f"{model['tokens']:,.0f}"),
    ("Cut off", "answers that reached the most new tokens", lambda model: f"{100 * model['unended']:.1f} %"),
    (
        "distinct-1",
        "share of all words that are distinct, within / across prompts; falls with length",
        lambda model: _both("distinct_1", model),
    ),
    ("distinct-2", "of two words in a row", lambda model: _both("distinct_2", model)),
    ("distinct-3", "of three words in a row", lambda model: _both("distinct_3", model)),
    (
        "Similarity",
        "mean cosine similarity of answers, within / across prompts; lower is more diverse",
        lambda model: _both("similarity", model),
    ),
]
