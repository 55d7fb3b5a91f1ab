"""Rows go through the stages in columns: one row more costs next to no Python, a loop over rows at least one line."""

import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pipelines.preparation import prepare
from pipelines.recipe import Recipe

FEW, MANY = 200, 1000
STEPS = (
    *("normalise={}", "clean.refusal=flag", "clean.personal_data=flag", "dedup={}", "label_noise={}"),
    *("tokenize.max_length=2000", "tokenize.max_prompt_length=1500"),
)


def text(draw: random.Random, words: int = 12) -> str:
    return " ".join("".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(words))


def dialogue(draw: random.Random) -> dict[str, Any]:
    history = "".join(f"\n\n{side}: {text(draw)}" for side in ("Human", "Assistant", "Human")[draw.choice([0, 2]) :])
    return {side: f"{history}\n\nAssistant: {text(draw)}" for side in ("chosen", "rejected")}


def rated(draw: random.Random) -> dict[str, Any]:
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    answers = [
        {
            "model": model,
            "response": text(draw),
            "custom_system_prompt": "Help.",
            "overall_score": draw.randint(1, 10),
            "annotations": {aspect: {"Rating": draw.choice("12345"), "Rationale": "so"} for aspect in aspects},
        }
        for model in ("one", "two", "three", "four")
    ]
    return {"source": "random", "instruction": text(draw), "completions": answers}


def pair(draw: random.Random) -> dict[str, Any]:
    scores = {"score_chosen": draw.randint(5, 9), "score_rejected": draw.random()}
    return {"prompt": text(draw), "chosen": text(draw), "rejected": text(draw), "metadata": scores}


def lines_run(work: Callable[[], object]) -> Counter[tuple[str, str]]:
    """Lines of Python run meanwhile, in every thread, by file and function."""
    lines: Counter[tuple[str, str]] = Counter()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":  # each turn of a comprehension is one too
            lines[frame.f_code.co_filename, frame.f_code.co_name] += 1
        return trace

    before, before_in_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(trace)
    threading.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        threading.settrace(before_in_threads)
    return lines


@pytest.mark.parametrize(
    ("dataset", "row", "most"),
    [("hh-rlhf", dialogue, 2.5), ("ultrafeedback", rated, 5), ("pairs", pair, 2.2)],
    ids=["hh-rlhf", "ultrafeedback", "pairs"],
)
def test_a_row_more_costs_no_loop(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    dataset: str,
    row: Callable[[random.Random], dict[str, Any]],
    most: float,
) -> None:
    """At most so many lines, in all stages with every step on; for rated answers some for each new set of ratings."""
    draw = random.Random(7)

    def run(name: str, count: int) -> Counter[tuple[str, str]]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(f"{json.dumps(row(draw))}\n" for _ in range(count)))
        sources = json.dumps([{"dataset": dataset, "path": str(tmp_path / name)}])
        recipe = make_recipe(f"sources={sources}", *STEPS)
        return lines_run(lambda: prepare(recipe, tmp_path / name / "out"))

    run("first", FEW)  # imports, and what is only found once
    few, many = run("few", FEW), run("many", MANY)
    more = {place: max(0, many[place] - few[place]) / (MANY - FEW) for place in many}  # pages may show less
    largest = sorted(((round(lines, 1), *place) for place, lines in more.items()), reverse=True)[:12]
    assert sum(more.values()) < most, largest
