"""How much a chat template may do for one conversation: it is code, and came with somebody's tokenizer.

Steps and characters are counted, so that the same conversation is refused on every machine. The clock is a last resort,
for what is slow without many steps.
"""

import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jinja2

from orpo_data.errors import OrpoError

_MOST_ITEMS = 1_000_000  # of a text or list that is repeated, and the largest number a template may call with
_MOST_POWER = 1_000
_MOST_CONSTANT = 10_000  # a number or text that is calculated with beforehand
_MOST_STEPS = 250_000  # turns of a loop, calls and filters; a sound template needs a few hundred
_MOST_MADE = 1 << 28  # bytes, about, of all texts and lists that a template makes on its way
_MOST_LINES = 1_000_000  # of Python, where transformers renders
_MOST_SECONDS = 10.0  # of one thread's work

_WIDE = re.compile(r"\{[^{}]*(\{|:[^{}]*\d{4})|%[-+ #0]*(\*|\d{4})")  # in a format, such as "{:>999999999}"
_GROWING = {"center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "translate", "zfill"}
"""Methods and filters that may write far more than they are given."""


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template that would run for ever or fill the memory."""


class Meter(threading.local):
    """What a rendering in this thread has come to."""

    steps, made, until = 0, 0, 0.0

    def restart(self) -> None:
        self.steps, self.made, self.until = 0, 0, time.thread_time() + _MOST_SECONDS

    def step(self) -> None:
        """Raises OrpoError, which ends the stage, where the clock says so: no row may come and go with the machine."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise TemplateLimitError(f"the template is not done after {_MOST_STEPS:,} steps")
        if self.steps % 64 == 0 and time.thread_time() > self.until:
            raise OrpoError(f"tokenize.chat_template: not done with one conversation after {_MOST_SECONDS:.0f} seconds")

    def make(self, size: int) -> None:
        self.made += size
        if self.made > _MOST_MADE:
            raise TemplateLimitError("the template writes too much")

    def count(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items, each a step."""
        for item in items:
            self.step()
            yield item

    def call(self, name: str, values: tuple[Any, ...]) -> None:
        """A method, function or filter `name` is to be called with `values`, the first of which may be its own."""
        self.step()
        sizes = [_size(value) for value in values]
        numbers = [value for value in values if isinstance(value, int)]
        if max(numbers, default=0) > _MOST_ITEMS:
            raise TemplateLimitError("the template counts too high")
        if name.startswith("format") and values and _WIDE.search(str(values[0])):  # the others may be messages
            raise TemplateLimitError("the template formats too widely")
        if name in _GROWING:
            self.make((sizes[0] + 1) * max(1, *sizes[1:], *numbers))
        self.make(sum(sizes) + sum(map(abs, numbers)))

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Refuses what would fill the memory: "a" * 10**12, 9**9**9, "%999999999d" % 1."""
        if operator == "%" and isinstance(left, str):
            raise TemplateLimitError("formatting by % is not for templates")
        if operator == "**" and not (abs(left) <= _MOST_POWER and abs(right) <= _MOST_POWER):
            raise TemplateLimitError("the template counts too high")
        if operator == "*" and not _small_product(left, right):
            raise TemplateLimitError("the template writes too much")
        if operator == "+":
            self.make(_size(left) + _size(right))


def refuse_large(constants: Iterable[Any]) -> None:
    """TemplateLimitError for a number, text or format that may make something large of a small template."""
    for value in constants:
        size = value if isinstance(value, int) else _size(value)
        if size > _MOST_CONSTANT or (isinstance(value, str) and _WIDE.search(value)):
            raise TemplateLimitError("the template calculates with large constants")


def _size(value: Any) -> int:
    """Bytes of a text, or of a list with the texts in it, about; 0 of what is neither."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return 8 * len(value) + sum(len(item) for item in value if isinstance(item, str))
    return 8 * len(value) if isinstance(value, range) else 0


def _small_product(left: Any, right: Any) -> bool:
    """Whether a text or list, where it is one, is not repeated beyond all measure."""
    sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
    repeats = any(isinstance(side, str | list | tuple) for side in (left, right))
    return not repeats or sizes[0] * sizes[1] <= _MOST_ITEMS


@contextmanager
def step_limit() -> Iterator[None]:
    """Stops transformers where it loops in a template, which it does without limits: the lines of Python are counted.

    That makes them slow, so it is for trying out and comparing.
    """
    steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > _MOST_LINES:
            raise TemplateLimitError(f"the template is not done after {_MOST_LINES:,} lines")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
