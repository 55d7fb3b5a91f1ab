"""IFEval's own rules, run on answers here: a package made of the paper's code has them (arXiv 2311.07911)."""

from collections.abc import Sequence
from dataclasses import dataclass

from orpo_data.errors import OrpoError
from orpo_data.extras import require_package
from pipelines.forms import Question


@dataclass(frozen=True)
class FollowedInstructions:
    """Shares of prompts, and of their instructions, that answers follow.

    Loose: also where it does so without its first line, its last line or its asterisks.
    """

    prompt_strict: float  # all instructions of the prompt
    prompt_loose: float
    instruction_strict: float
    instruction_loose: float


def require_rules() -> None:
    require_package("if_verifiable", "ifeval", "--check")


def check_answers(questions: Sequence[Question], answers: Sequence[str]) -> FollowedInstructions:
    """How far answers follow the instructions of IFEval's questions.

    Raises OrpoError naming the question whose instructions are missing or unknown, or where nltk lacks its data.
    """
    strict: list[list[bool]] = []
    loose: list[list[bool]] = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
        told = _check(question, answer, number)
        strict.append([follows for follows, _ in told])
        loose.append([follows for _, follows in told])
    return FollowedInstructions(_prompts(strict), _prompts(loose), _instructions(strict), _instructions(loose))


def _check(question: Question, answer: str, number: int) -> list[tuple[bool, bool]]:
    """Whether each instruction is followed, strictly and loosely."""
    from if_verifiable import IFEvalSample, evaluate_output_for_sample
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0  # it draws; the same answer must be judged the same
    record = question.record
    names, settings = record.get("instruction_id_list"), record.get("kwargs")
    if not names or not isinstance(settings, list) or len(settings) != len(names):
        raise OrpoError(f"question {number} (key {record.get('key')}): has no instruction_id_list with as many kwargs")
    sample = IFEvalSample(record.get("key", number), question.turns[0], names, settings)
    try:
        found, _ = evaluate_output_for_sample("ifeval", sample, answer)
    except LookupError:
        raise OrpoError(
            "--check: nltk lacks the data to split sentences; python -m nltk.downloader punkt_tab, once"
        ) from None
    if not answer.strip():
        return [(False, False)] * len(names)
    if len(found) < len(names):
        unknown = sorted(set(names) - {result.instruction_id for result in found})
        raise OrpoError(f"question {number} (key {record.get('key')}): {unknown[0]!r} is no instruction of IFEval")
    return [(result.strict_pass, result.loose_pass) for result in found]


def _prompts(followed: list[list[bool]]) -> float:
    return sum(map(all, followed)) / len(followed)


def _instructions(followed: list[list[bool]]) -> float:
    return sum(map(sum, followed)) / sum(map(len, followed))
