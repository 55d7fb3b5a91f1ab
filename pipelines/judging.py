"""Answers of two models to held-out prompts under a reward model: who wins, how sure that is, and what goes with it."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich import box
from rich.table import Table

from orpo_data.chat import Chat
from orpo_data.errors import OrpoError, UsageError
from orpo_data.places import as_path
from orpo_data.schema import ANSWERS
from orpo_data.shards import fetch_folder
from orpo_train.diversity import lexical, semantic
from orpo_train.evaluate import Precision
from orpo_train.generate import end_tokens, generate
from orpo_train.model import best_device, load_model
from orpo_train.reward import load_reward_model, score
from orpo_train.win_rate import Array, error_over_prompts, length_controlled, longer_wins, outcomes, spread
from pipelines.reading import Answer, HeldOut, Reader
from pipelines.recipe import EvaluateConfig, JudgeConfig, explain_errors

log = logging.getLogger(__name__)

ANSWERS_NAME = "answers.jsonl"
NGRAMS = (1, 2, 3)
EXAMPLES = 4


@dataclass(frozen=True)
class Answers:
    """What a model answers to the prompts: one draw for each seed, [seeds][prompts]."""

    model: str
    draws: list[list[Answer]]

    @property
    def texts(self) -> list[list[str]]:
        return [[answer.text for answer in draw] for draw in self.draws]

    @property
    def characters(self) -> Array:
        """Their lengths, [seeds, prompts]."""
        return np.array([[len(text) for text in draw] for draw in self.texts], float)


def draw_answers(reader: Reader, prompts: HeldOut, settings: JudgeConfig, precision: Precision) -> Answers:
    """Let the reader's model answer every prompt once for each seed."""
    started, folder = time.monotonic(), reader.folder
    if reader.chat:
        log.info("%s has another tokenizer than the dataset: it reads the texts, in its own chat template", folder)
    tokenizer = reader.chat.tokenizer if reader.chat else prompts.tokenizer
    device = best_device()
    model: Any = load_model(folder).to(device)
    ends = end_tokens(model, tokenizer) | end_of_turn(reader, prompts)
    ids, draws = reader.prompts(prompts), []
    for seed in settings.seeds:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            drawn = generate(model, ids, settings.sampling(seed), ends)
        draws.append([_answer(tokens, tokenizer, ends, own=reader.chat is None) for tokens in drawn])
        took = time.monotonic() - started
        log.info("%s answered %d prompts, seed %d (%.0f s)", shown_name(folder), len(ids), seed, took)
    return Answers(shown_name(folder), draws)


def end_of_turn(reader: Reader, prompts: HeldOut) -> set[int]:
    """The id that ends a turn in the template of the prompts, whatever a base model ends its texts with."""
    if reader.chat:
        return {reader.chat.end_of_turn_id}
    return {Chat(prompts.tokenizer).end_of_turn_id} if prompts.tokenizer.chat_template else set()


def shown_name(folder: Path) -> str:
    """A model by its folder's name; runs call theirs all `model`, and are told apart by the folder around it."""
    place = folder.resolve()
    return f"{place.parent.name}/{place.name}" if place.name == "model" else place.name


def _answer(tokens: list[int], tokenizer: Any, ends: set[int], *, own: bool) -> Answer:
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return Answer(text, tokens if own else None, tokens[-1] in ends, len(tokens))


class Judge:
    """The reward model in a folder."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder = folder
        self.reader = Reader.of(folder, tokenizer)
        if self.reader.chat:
            log.info("%s has another tokenizer: what it judges is tokenized again, in its own chat template", folder)
        self._model = load_reward_model(folder).to(best_device())

    def rewards(self, data: HeldOut, answers: Sequence[Answer]) -> Array:
        """The reward of an answer to every row's prompt, [rows]. OrpoError if one is not a number."""
        try:
            rewards = score(self._model, self.reader.conversations(data, answers))
        except OrpoError as error:
            raise OrpoError(f"{self.folder}: {error}") from None
        return rewards.double().numpy()


def judge_settings(asked: Mapping[str, Any]) -> EvaluateConfig:
    """The settings of an evaluation from command line options, None where one was not given."""
    given = {name: value for name, value in asked.items() if value is not None}
    if not given:
        return EvaluateConfig()
    if "reward_model" not in given:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} is about judged answers: give --reward-model too")
    try:
        if "seeds" in given:
            given["seeds"] = [int(seed) for seed in given["seeds"].split(",")]
        return EvaluateConfig(judge=JudgeConfig.model_validate(given))
    except ValidationError as error:
        raise UsageError(explain_errors(JudgeConfig, "orpo evaluate", error)) from None
    except ValueError:
        raise UsageError(f"--seeds {given['seeds']!r}: whole numbers with commas between them, e.g. 1,2,3") from None


def judge_models(
    models: Mapping[str, Path], pairs: HeldOut, settings: JudgeConfig, precision: Precision, folder: Path
) -> dict[str, Any]:
    """Everything a reward model says of one or two models, as plain JSON values.

    `models` has `model` and, if there is one to compare with, `against`. Every answer with its reward is written to
    answers.jsonl in `folder`.
    """
    readers = {role: Reader.of(place, pairs.tokenizer) for role, place in models.items()}
    judge = Judge(fetch_folder(as_path(settings.reward_model)), pairs.tokenizer)
    # the data's own pairs first: a judge that cannot judge is found out before the long part
    chosen, rejected = (judge.rewards(pairs, pairs.answers(side)) for side in ANSWERS)
    prompts = pairs.prompts(settings.prompts)
    answers = {role: draw_answers(reader, prompts, settings, precision) for role, reader in readers.items()}
    rewards = {
        role: np.stack([judge.rewards(prompts, draw) for draw in given.draws]) for role, given in answers.items()
    }  # [seeds, prompts]
    _write(folder / ANSWERS_NAME, prompts, settings.seeds, answers, rewards)
    return {
        "reward_model": shown_name(judge.folder),
        "tokenized_again": judge.reader.chat is not None,
        "prompts": len(prompts.ids),
        "settings": settings.model_dump(mode="json", include={"seeds", "temperature", "top_p", "max_new_tokens"}),
        "pair_accuracy": float(outcomes(chosen, rejected).mean()),
        "pairs": {"chosen": chosen.tolist(), "rejected": rejected.tolist()},
        "win_rate": win_rate(answers, rewards) if "against" in models else None,
        "models": {role: _describe(answers[role], rewards[role], settings.embedding_model) for role in models},
        "examples": _examples(prompts, answers, rewards),
    }


def win_rate(answers: Mapping[str, Answers], rewards: Mapping[str, Array]) -> dict[str, Any]:
    """How often `model` wins over `against`: for each seed, and all together at equal length."""
    scores = outcomes(rewards["model"], rewards["against"])  # [seeds, prompts]
    longer = (answers["model"].characters - answers["against"].characters).ravel()
    seeds = scores.mean(axis=1)
    return {
        "mean": float(seeds.mean()),
        "deviation": spread(seeds),
        "error": error_over_prompts(scores),
        "seeds": seeds.tolist(),
        "ties": float((scores == 0.5).mean()),
        "length_controlled": length_controlled(scores.ravel(), longer),
        "longer_wins": longer_wins(scores.ravel(), longer),
    }


def _describe(answers: Answers, rewards: Array, embedding_model: str | None) -> dict[str, Any]:
    flat = [answer for draw in answers.draws for answer in draw]
    return {
        "name": answers.model,
        "reward": {"mean": float(rewards.mean()), "deviation": spread(rewards.mean(axis=1))},
        "characters": {"mean": float(answers.characters.mean()), "median": float(np.median(answers.characters))},
        "tokens": float(np.mean([answer.tokens for answer in flat])),
        "unended": float(np.mean([not answer.ended for answer in flat])),
        **{f"distinct_{n}": lexical(answers.texts, n) for n in NGRAMS},
        "similarity": semantic(answers.texts, fetch_folder(as_path(embedding_model))) if embedding_model else None,
        "rewards": rewards.tolist(),
    }


def _write(
    file: Path, prompts: HeldOut, seeds: Sequence[int], answers: Mapping[str, Answers], rewards: Mapping[str, Array]
) -> None:
    """A line for each prompt and seed, with the answer of each model and its reward."""
    with file.open("w", encoding="utf-8") as lines:
        for draw, seed in enumerate(seeds):
            for row, name in enumerate(prompts.ids):
                line = {"id": name, "seed": seed} | _judged(answers, rewards, draw, row)
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _judged(answers: Mapping[str, Answers], rewards: Mapping[str, Array], draw: int, row: int) -> dict[str, Any]:
    return {
        role: {"answer": given.draws[draw][row].text, "reward": float(rewards[role][draw, row])}
        for role, given in answers.items()
    }


def _examples(prompts: HeldOut, answers: Mapping[str, Answers], rewards: Mapping[str, Array]) -> list[dict[str, Any]]:
    """The first prompts with their answers of the first seed."""
    return [
        {"id": prompts.ids[row], "prompt": prompts.question(row)} | _judged(answers, rewards, 0, row)
        for row in range(min(EXAMPLES, len(prompts.ids)))
    ]


def summary(judged: Mapping[str, Any]) -> dict[str, Any]:
    """The figures without the values of single answers."""
    models = {
        role: {name: value for name, value in model.items() if name != "rewards"}
        for role, model in judged["models"].items()
    }
    return {name: value for name, value in judged.items() if name not in ("pairs", "examples")} | {"models": models}


def judge_table(judged: Mapping[str, Any]) -> Table:
    """What the reward model says, a column for each model."""
    models = judged["models"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{judged['prompts']} prompts, judged by {judged['reward_model']}")
    for model in models.values():
        table.add_column(model["name"], justify="right")
    if rate := judged["win_rate"]:
        sure = "" if rate["deviation"] is None else f" ± {100 * rate['deviation']:.1f}"
        table.add_row(f"win rate over {models['against']['name']}, %", f"{100 * rate['mean']:.1f}{sure}", "")
        if rate["error"] is not None:
            table.add_row("  its standard error over prompts", f"{100 * rate['error']:.1f}", "")
        table.add_row("win rate at equal length, %", f"{100 * rate['length_controlled']:.1f}", "")
    rows = {
        "reward": lambda model: f"{model['reward']['mean']:.4f}",
        "characters": lambda model: f"{model['characters']['mean']:.0f}",
        "cut off, %": lambda model: f"{100 * model['unended']:.1f}",
        "distinct-2 across prompts": lambda model: _known(model["distinct_2"]["across"]),
        "distinct-2 within prompts": lambda model: _known(model["distinct_2"]["within"]),
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, models.values()))
    return table


def _known(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
