"""A model's answers to a public judge's questions, in its file form, with a card of how they were made."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import torch
from pydantic import ValidationError

from orpo_data import provenance
from orpo_data.chat import Chat, Messages, template_names
from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import digest
from orpo_data.pages.render import markdown
from orpo_data.places import file_sha256, write_whole
from orpo_train.config import Sampling
from orpo_train.evaluate import Precision, load_tokenizer
from orpo_train.generate import end_tokens, generate
from orpo_train.model import best_device, load_model
from pipelines.forms import FORMS, Question, read_questions
from pipelines.ifeval import FollowedInstructions, check_answers, require_rules
from pipelines.recipe import explain_errors
from pipelines.training import fetch_model, model_fingerprint

log = logging.getLogger(__name__)

CARD = """\
# Answers of {name}

In the file form of `{form}`: {file}, sha256 `{sha256}`.

| setting | value |
|---|---|
{settings}
"""


@dataclass(frozen=True)
class AnswersReport:
    """What was written where."""

    path: Path
    card: Path
    questions: int
    unended: int  # answers that reached the most new tokens
    followed: FollowedInstructions | None = None  # by IFEval's rules, if they were asked for


def answer_questions(
    model: str,
    prompts: Path,
    form: str,
    output: Path,
    *,
    name: str | None = None,
    chat_template: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    precision: Precision | None = None,
    check: bool = False,
) -> AnswersReport:
    """Answer a judge's questions and write its file and, beside it, FILE.md with every setting.

    `form` is one of FORMS; `sampling` overrides the judge's own settings, and a temperature in it holds for all
    questions; `check` runs IFEval's own rules on the answers. Both files are written last, each whole.
    OrpoError if the questions cannot be read or the model has no chat template.
    """
    judge, given = FORMS[form], sampling or {}
    if check and form != "ifeval":
        raise UsageError(f"--check: there are rules for ifeval alone, not for {form}")
    if check:
        require_rules()
    settings = _settings(judge.sampling, given)
    questions = read_questions(prompts, judge)
    folder = fetch_model(model, None)
    name = name or folder.name
    chat = _chat(folder, chat_template)
    temperatures = [
        settings.temperature if "temperature" in given or question.temperature is None else question.temperature
        for question in questions
    ]
    precision = precision or ("bf16" if torch.cuda.is_available() else "fp32")
    answers, unended = _answer(folder, chat, questions, temperatures, settings, precision)
    followed = check_answers(questions, [answer for (answer,) in answers]) if check else None
    write_whole(output, judge.answers(questions, answers, name))
    shown = {
        "model": f"{markdown(folder.name)}, fingerprint `{model_fingerprint(folder)[:12]}`",
        "questions": f"{len(questions):,} of {markdown(prompts.name)}, sha256 `{file_sha256(prompts)[:12]}`",
        "chat template": f"{markdown(chat_template or 'of the tokenizer')}, digest `{digest(chat.template)[:12]}`",
        "temperature": ", ".join(f"{value:g}" for value in sorted(set(temperatures))),
        "top-p": f"{settings.top_p:g}",
        "seed": settings.seed,
        "most new tokens": f"{settings.max_new_tokens:,}",
        "answers that reached it": f"{unended:,}",
        "precision": precision,
        "packages": ", ".join(f"{package} {number}" for package, number in provenance.package_versions().items()),
        "defaults from": judge.source,
    }
    if followed:
        shown |= {
            f"followed, {name.replace('_', ', ')}": f"{100 * share:.2f} %" for name, share in vars(followed).items()
        }
    rows = "\n".join(f"| {key} | {value} |" for key, value in shown.items())
    card = output.with_name(f"{output.name}.md")
    names = {"name": markdown(name), "file": markdown(output.name)}
    write_whole(card, CARD.format(**names, form=form, sha256=file_sha256(output), settings=rows))
    return AnswersReport(output, card, len(questions), unended, followed)


def _settings(usual: Sampling, given: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling.model_validate({**usual.model_dump(), **given})
    except ValidationError as error:
        raise UsageError(explain_errors(Sampling, "orpo generate", error)) from None


def _chat(folder: Path, chat_template: str | None) -> Chat:
    if chat_template is None and not load_tokenizer(folder).chat_template:
        raise UsageError(
            f"{folder}: its tokenizer has no chat template; give --chat-template, a jinja file or one of "
            f"{', '.join(template_names())}"
        )
    return Chat.load(str(folder), chat_template)


def _answer(
    folder: Path,
    chat: Chat,
    questions: Sequence[Question],
    temperatures: Sequence[float],
    settings: Sampling,
    precision: Precision,
) -> tuple[list[list[str]], int]:
    """The answer to every turn of each question, in the light of those before; and how many were cut off."""
    device = best_device()
    model: Any = load_model(folder).to(device)
    ends = end_tokens(model, chat.tokenizer) | {chat.end_of_turn_id}
    talks: list[Messages] = [[] for _ in questions]
    answers: list[list[str]] = [[] for _ in questions]
    unended = 0
    for turn in range(max(len(question.turns) for question in questions)):
        by_temperature = defaultdict(list)
        for number, question in enumerate(questions):
            if turn < len(question.turns):
                talks[number].append({"role": "user", "content": question.turns[turn]})
                by_temperature[temperatures[number]].append(number)
        for temperature, numbers in by_temperature.items():
            prompts = _encode(chat, [talks[number] for number in numbers], numbers)
            drawn = settings.model_copy(update={"temperature": temperature})
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                made = generate(model, prompts, drawn, ends)
            for number, tokens in zip(numbers, made, strict=True):
                text = chat.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                answers[number].append(text)
                talks[number].append({"role": "assistant", "content": text})
                unended += tokens[-1] not in ends
            log.info("turn %d: %d questions answered at temperature %g", turn + 1, len(numbers), temperature)
    return answers, unended


def _encode(chat: Chat, talks: Sequence[Messages], numbers: Sequence[int]) -> list[list[int]]:
    """Token ids of conversations up to the assistant's next turn."""
    texts = []
    for talk, number in zip(talks, numbers, strict=True):
        if held := [token for token in chat.control_tokens if any(token in message["content"] for message in talk)]:
            log.warning("question %d holds %r, which its tokenizer reads as a control token", number + 1, held[0])
        try:
            texts.append(chat.render_prompt(talk))
        except jinja2.TemplateError as error:
            raise OrpoError(f"the chat template refuses question {number + 1}: {error}") from None
    ids: list[list[int]] = chat.encode_prompts(pa.array(texts, pa.string())).to_pylist()
    return ids
