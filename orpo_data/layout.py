"""What a chat template writes for a sequence of roles, whatever the messages say: literals, and slots for contents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Roles = tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """The place of a message's content, which may stand there without its outer white space."""

    message: int
    left: bool = False  # stripped on this side
    right: bool = False


Part = str | Slot
Parts = tuple[Part, ...]


@dataclass(frozen=True)
class Layout:
    """What a template writes for [*prompt, *answer]: literals, and slots that count the messages of both."""

    prompt: Parts
    answer: Parts  # what follows the prompt, without what follows the answer
    filled: frozenset[int]  # messages that must hold more than white space


def fill(parts: Parts, contents: Sequence[str]) -> str:
    """The text of `parts`: the definition of what they mean."""
    return "".join(part if isinstance(part, str) else _content(contents[part.message], part) for part in parts)


def _content(text: str, slot: Slot) -> str:
    text = text.lstrip() if slot.left else text
    return text.rstrip() if slot.right else text


def merged(parts: Iterable[Part]) -> Parts:
    """`parts` without empty literals and with neighbouring ones joined."""
    whole: list[Part] = []
    for part in parts:
        if isinstance(part, str) and whole and isinstance(whole[-1], str):
            whole[-1] += part
        elif part:
            whole.append(part)
    return tuple(whole)


def between(head: Parts, whole: Parts, after: str) -> Parts | None:
    """`whole` without `head` before it and `after` behind it; None where it has not both."""
    count = len(head) - 1
    if count < 0 or len(whole) <= count or whole[:count] != head[:count]:
        return None
    last, *rest = whole[count:]
    if isinstance(last, str) and isinstance(head[-1], str) and last.startswith(head[-1]):
        rest = [last[len(head[-1]) :], *rest]
    elif last != head[-1]:
        return None
    *rest, end = merged(rest) or ("",)
    if isinstance(end, Slot):
        return (*rest, end) if not after else None
    return merged((*rest, end.removesuffix(after))) if end.endswith(after) else None
