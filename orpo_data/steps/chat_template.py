"""Messages to text, by the tokenizer's chat template."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, PlainSerializer

from orpo_data.chat import Chat
from orpo_data.conversations import Conversations, Mask, lay_out, write
from orpo_data.errors import OrpoError
from orpo_data.schema import RENDERED, SIDES
from orpo_data.steps.control_text import ControlText, Marks, escaped
from orpo_data.steps.step import Step, StepOutput, dropped_rows

log = logging.getLogger(__name__)

ChatField = Annotated[Chat, PlainSerializer(lambda chat: chat.fingerprint, return_type=str)]
"""A step's tokenizer and template; its configuration records their fingerprint."""

Texts = dict[str, pa.StringArray]
Failed = dict[int, tuple[str, str]]
"""By row: reason and detail."""


class ChatTemplate(Step):
    """Renders prompt, chosen and rejected once each.

    A message that spells a control token, or what begins a turn in this template, would become one: such a pair is
    dropped, or the text is escaped. A pair is also dropped when the template refuses the conversation or writes nothing
    for one of its parts.

    Rows whose roles have a layout are written in columns, the others one by one by the template itself.
    """

    name: ClassVar[str] = "chat_template"
    version: ClassVar[int] = 6

    chat: ChatField = Field(description="Tokenizer and template.")
    control_text: ControlText = Field(default="drop", description="What becomes of text that would be control.")

    def apply(self, table: pa.Table) -> StepOutput:
        marks = Marks(self.chat.control_tokens, self.chat.turn_labels)
        sides = {name: Conversations(table[name]) for name in SIDES}
        failed: Failed = marks.find(sides)
        rewritten: Failed = {}
        if failed and self.control_text != "drop":
            rewritten, table = failed, escaped(table, sorted(failed), SIDES, marks)
            sides = {name: Conversations(table[name]) for name in SIDES}
            failed = marks.find(sides)
        texts, written = self._write(sides)
        if written.any() and not self._is_rendered(table, _texts_of(texts, first := int(written.argmax())), first):
            log.warning("chat_template: the template does not write what its layout says; rendering row by row")
            written[:] = False
        rendered: dict[int, dict[str, str]] = {}
        others = [row for row in np.flatnonzero(~written).tolist() if row not in failed]
        talks = table.select(SIDES).take(pa.array(others, pa.int64())).to_pylist() if others else []
        for row, messages in zip(others, talks, strict=True):
            try:
                rendered[row] = self._render(messages)
            except jinja2.TemplateError as error:
                failed[row] = ("refused_by_template", str(error))
        shortest = min(rendered, key=lambda row: len("".join(rendered[row].values())), default=0)
        if rendered and not self._is_rendered(table, rendered[shortest], shortest) and not self.chat.tells_the_time:
            raise OrpoError(f"chat_template: transformers renders row {table['id'][shortest]} differently")
        texts = _replaced(texts, rendered)
        columns = {name: texts[name] if name in texts else table[name] for name in RENDERED.names}
        kept, (keep, dropped) = pa.table(columns, schema=RENDERED), set_aside(self.name, table, failed)
        reasons = [reason for row, (reason, _) in rewritten.items() if row not in failed]
        return StepOutput(
            kept.filter(pa.array(keep)) if failed else kept,
            dropped,
            changed=len(reasons),
            flagged=Counter(reasons) if self.control_text == "flag" else {},
        )

    def _write(self, sides: dict[str, Conversations]) -> tuple[Texts, Mask]:
        """The texts of all rows that can be written in columns, and which rows these are."""
        texts, prompts = {}, sides["prompt"]
        written = np.ones_like(prompts.sound)
        for side in ("chosen", "rejected"):
            laid_out = lay_out(prompts, sides[side], self.chat.layout)
            texts[f"{side}_text"] = write(laid_out, "answer", prompts, sides[side])
            found = np.zeros_like(written)
            for group in laid_out:
                found[group.rows] = True
            written &= found
        texts["prompt_text"] = write(laid_out, "prompt", prompts, sides[side])
        return texts, written

    def _is_rendered(self, table: pa.Table, texts: dict[str, str], row: int) -> bool:
        """Whether transformers writes these texts too."""
        (messages,) = table.select(SIDES).slice(row, 1).to_pylist()
        return self._render(messages, reference=True) == texts

    def _render(self, row: dict[str, Any], *, reference: bool = False) -> dict[str, str]:
        """The texts of one row, by the template itself."""
        with _naming("prompt"):
            texts = {"prompt_text": self.chat.render_prompt(row["prompt"], reference=reference)}
        for side in ("chosen", "rejected"):
            with _naming(side):
                asked = row["prompt"], texts["prompt_text"], row[side]
                texts[f"{side}_text"] = self.chat.render_answer(*asked, reference=reference)
        return texts


def _texts_of(texts: Texts, row: int) -> dict[str, str]:
    return {name: column[row].as_py() for name, column in texts.items()}


def set_aside(step: str, table: pa.Table, failed: Failed) -> tuple[Mask, pa.Table]:
    """Which rows of `table` did not fail, and those that did as DROPPED rows of `step`."""
    rows = sorted(failed)
    keep = np.ones(len(table), bool)
    keep[rows] = False
    reasons, details = (pa.array([failed[row][i] for row in rows], pa.string()) for i in (0, 1))
    return keep, dropped_rows(step, table.filter(pa.array(~keep)), reasons, details)


def _replaced(texts: Texts, rendered: dict[int, dict[str, str]]) -> Texts:
    """`texts` with those of the rendered rows."""
    rows = sorted(rendered)
    mask = np.zeros(len(texts["prompt_text"]), bool)
    mask[rows] = True
    own = {name: pa.array([rendered[row][name] for row in rows], pa.string()) for name in texts}
    return {name: pc.replace_with_mask(texts[name], pa.array(mask), own[name]) for name in texts} if rows else texts


@contextmanager
def _naming(side: str) -> Iterator[None]:
    """What the template says of a message is told with its side."""
    try:
        yield
    except jinja2.TemplateError as error:
        raise jinja2.TemplateRuntimeError(f"{side}: {error}") from error
