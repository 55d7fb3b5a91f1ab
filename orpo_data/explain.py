"""The values by which a step decided on one row, read from the row's own columns or drawn again from its id."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from orpo_data.manifest import StepCounts
from orpo_data.schema import RATED
from orpo_data.steps.binarize import Binarize
from orpo_data.steps.draws import uniform
from orpo_data.steps.near import key_of
from orpo_data.steps.ratings import STRATEGIES, weighted_aspects
from orpo_data.steps.sample import Sample
from orpo_data.steps.split import Split, opening_text

Row = Mapping[str, Any]

Explanation = Callable[[StepCounts, Sequence[Row], Row], dict[str, Any]]
"""From a step as the manifest has it, the rows its stage read of this record, and the row as it left the stage (as it
entered the step, where it fell)."""


def explain(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    """What decided at `step`, by name; without the values that the row does not have (yet)."""
    found = EXPLANATIONS.get(step.step, _nothing)(step, before, row)
    return {name: value for name, value in found.items() if value is not None}


def _nothing(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    return {}


def _parse(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    answers = len(row["completions"]) if "completions" in row else None
    return {"subset": row.get("subset"), "answers": answers} | _scores(row)


def _scores(row: Row) -> dict[str, Any]:
    return {name: row.get(name) for name in ("score_chosen", "score_rejected", "model_chosen", "model_rejected")}


def _binarize(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    """Every answer's score, and which of the lower answers the draw picked."""
    rated = next((candidate for candidate in (row, *before) if "completions" in candidate), None)
    if rated is None or step.version != Binarize.version:
        return _scores(row)  # the rated answers are gone, or were scored by other rules than today's
    weights = step.config["weights"]
    rule = weighted_aspects(weights) if weights else STRATEGIES[step.config["strategy"]]
    scores = [{"model": answer["model"], "score": rule(answer)} for answer in rated["completions"]]
    return {"scores": scores, "drawn": _drawn(step, rated, row["id"])} | _scores(row)


def _drawn(step: StepCounts, rated: Row, pair: str) -> str | None:
    """The place of a pair among those that the draw had to choose from, which are those of `rejected: all`."""
    if step.config["rejected"] != "random":
        return None
    everything = Binarize.model_validate(step.config | {"rejected": "all"})
    candidates = everything.apply(pa.Table.from_pylist([rated], schema=RATED)).kept["id"].to_pylist()
    return f"{candidates.index(pair) + 1} of {len(candidates)}" if pair in candidates else None


def _sample(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    """Rows with a draw below the share are kept, or the `count` with the smallest."""
    drawn = uniform(step.config["seed"], "sample", row["id"]) if step.version == Sample.version else None
    return {"draw": drawn, "share": step.config.get("share"), "count": step.config.get("count")}


def _clean(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    return {"flags": row.get("flags") or None}


def _normalise(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    return {"changed": row["id"] not in [earlier["id"] for earlier in before]}


def _label_noise(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    return {"label_noise": row.get("label_noise")}


def _split(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    """The group's draw; below the share it is held out. A group is named by the hash of its opening turn."""
    if step.version != Split.version:
        return {}
    group = key_of(opening_text(row["prompt"]))
    share = step.config["eval_fractions"].get(row["source"], step.config["eval_fraction"])
    return {"group": group, "draw": uniform(step.config["seed"], "split", group), "eval_below": share}


def _truncate(step: StepCounts, before: Sequence[Row], row: Row) -> dict[str, Any]:
    """Lengths in tokens and what was cut; of a row that fell, its lengths before any cut."""
    lengths = {name.replace("_ids", "_tokens"): len(ids) for name, ids in row.items() if name.endswith("_ids")}
    cut = ("prompt_len", "prompt_turns_dropped", "chosen_truncated", "rejected_truncated")
    return lengths | {name: row.get(name) for name in cut}


EXPLANATIONS: dict[str, Explanation] = {
    "parse": _parse,
    "binarize": _binarize,
    "sample": _sample,
    "normalise": _normalise,
    "clean": _clean,
    "label_noise": _label_noise,
    "split": _split,
    "truncate": _truncate,
}
