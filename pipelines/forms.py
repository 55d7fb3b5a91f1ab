"""The file forms of public judges: the questions they ask, the answers they read, and how they want them drawn."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_data.errors import OrpoError
from orpo_data.manifest import digest
from orpo_train.config import Sampling


@dataclass(frozen=True)
class Question:
    """One item of a judge's file."""

    record: dict[str, Any]
    turns: tuple[str, ...]  # what the user says, in order
    temperature: float | None = None  # the judge's own for this question


@dataclass(frozen=True)
class Form:
    """How one judge writes questions and reads answers."""

    question: Callable[[dict[str, Any]], Question]  # KeyError names what a record lacks
    answers: Callable[[Sequence[Question], Sequence[Sequence[str]], str], str]  # the file, from each question's turns
    sampling: Sampling  # what the judge draws with, where it says
    source: str  # where it says so


def read_questions(file: Path, form: Form) -> list[Question]:
    """The questions of a judge's own file, a JSON list or JSON lines; OrpoError naming the item that is wrong."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OrpoError(f"{file}: cannot be read: {error}") from None
    questions = []
    for number, record in enumerate(_records(file, text), start=1):
        if not isinstance(record, dict):
            raise OrpoError(f"{file}: item {number} is a {type(record).__name__}, an object with a question is needed")
        try:
            question = form.question(record)
        except KeyError as error:
            raise OrpoError(f"{file}: item {number} has no {error}, only {', '.join(record) or 'nothing'}") from None
        if not question.turns or not all(isinstance(turn, str) and turn.strip() for turn in question.turns):
            raise OrpoError(f"{file}: item {number} asks nothing: a turn is empty or no text")
        questions.append(question)
    if not questions:
        raise OrpoError(f"{file}: has no questions")
    return questions


def _records(file: Path, text: str) -> list[Any]:
    """The items of a JSON list, or of lines of JSON."""
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
    except ValueError as error:
        raise OrpoError(f"{file}: no JSON: {error}") from None
    records = []
    for number, line in enumerate(text.split("\n"), start=1):  # a text may hold what else splitlines() cuts at
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise OrpoError(f"{file}: line {number} is no JSON: {error}") from None
    return records


# --- AlpacaEval: https://github.com/tatsu-lab/alpaca_eval ------------------------------------------------------------


def _alpaca_question(record: dict[str, Any]) -> Question:
    return Question(record, (record["instruction"],))


def _alpaca_answers(questions: Sequence[Question], answers: Sequence[Sequence[str]], model: str) -> str:
    """model_outputs: a JSON list."""
    outputs = [
        {
            "instruction": question.turns[0],
            "output": answer,
            "generator": model,
            **{name: question.record[name] for name in ("dataset", "datasplit") if name in question.record},
        }
        for question, (answer,) in zip(questions, answers, strict=True)
    ]
    return json.dumps(outputs, indent=2, ensure_ascii=False) + "\n"


# --- MT-Bench: https://github.com/lm-sys/FastChat, fastchat/llm_judge ------------------------------------------------

MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""By category, from fastchat/llm_judge/common.py; other categories have 0.7."""


def _mt_bench_question(record: dict[str, Any]) -> Question:
    for name in ("question_id", "category"):
        record[name]  # it is needed
    return Question(record, tuple(record["turns"]), MT_BENCH_TEMPERATURES.get(record["category"], 0.7))


def _mt_bench_answers(questions: Sequence[Question], answers: Sequence[Sequence[str]], model: str) -> str:
    """model_answer/MODEL.jsonl: one choice of all turns for each question."""
    lines = []
    for question, turns in zip(questions, answers, strict=True):
        name = question.record["question_id"]
        line = {
            "question_id": name,
            "answer_id": digest([name, model, list(turns)])[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": time.time(),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


# --- IFEval: https://github.com/google-research/google-research, instruction_following_eval --------------------------


def _ifeval_question(record: dict[str, Any]) -> Question:
    return Question(record, (record["prompt"],))


def _ifeval_answers(questions: Sequence[Question], answers: Sequence[Sequence[str]], model: str) -> str:
    """input_response_data: a line with prompt and response for each question."""
    pairs = zip(questions, answers, strict=True)
    lines = ({"prompt": question.turns[0], "response": answer} for question, (answer,) in pairs)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


FORMS = {
    "alpaca-eval": Form(
        _alpaca_question,
        _alpaca_answers,
        Sampling(temperature=0.7, top_p=1.0, max_new_tokens=2048),
        "what AlpacaEval ran zephyr-7b-beta with (src/alpaca_eval/models_configs); it leaves the choice to the model",
    ),
    "mt-bench": Form(
        _mt_bench_question,
        _mt_bench_answers,
        Sampling(temperature=0.7, top_p=1.0, max_new_tokens=1024),
        "FastChat's fastchat/llm_judge: temperatures by category in common.py, 1,024 tokens in gen_model_answer.py",
    ),
    "ifeval": Form(
        _ifeval_question,
        _ifeval_answers,
        Sampling(temperature=0, max_new_tokens=1280),
        "EleutherAI's lm-evaluation-harness, lm_eval/tasks/ifeval/ifeval.yaml",
    ),
}
"""The judges by the names of `orpo generate --form`."""
