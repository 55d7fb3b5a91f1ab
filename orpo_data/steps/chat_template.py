"""Messages to text, by the tokenizer's chat template."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import jinja2
import polars as pl
import pyarrow as pa
from pydantic import Field, PlainSerializer

from orpo_data.chat import Chat
from orpo_data.schema import RENDERED
from orpo_data.steps.step import Step, StepOutput, dropped_rows

ChatField = Annotated[Chat, PlainSerializer(lambda chat: chat.fingerprint, return_type=str)]
"""A step's tokenizer and template; its configuration records their fingerprint."""


class ChatTemplate(Step):
    """Renders prompt, chosen and rejected once each.

    A pair is dropped when a message holds the text of a control token (it would become one), or when the template
    refuses the conversation or writes nothing for one of its parts.
    """

    name: ClassVar[str] = "chat_template"
    version: ClassVar[int] = 2

    chat: ChatField = Field(description="Tokenizer and template.")

    def apply(self, table: pa.Table) -> StepOutput:
        rendered, failed, reasons, details = [], [], [], []
        for index, (row, found) in enumerate(zip(table.to_pylist(), self._control_tokens_in(table), strict=True)):
            reason, detail = ("control_token_in_text", found) if found else (None, None)
            if reason is None:
                try:
                    rendered.append(self._render(row))
                    continue
                except jinja2.TemplateError as error:
                    reason, detail = "refused_by_template", str(error)
            failed.append(index)
            reasons.append(reason)
            details.append(detail)
        losers = table.take(pa.array(failed, pa.int64()))
        dropped = dropped_rows(self.name, losers, pa.array(reasons, pa.string()), pa.array(details, pa.string()))
        return StepOutput(pa.Table.from_pylist(rendered, schema=RENDERED), dropped)

    def _render(self, row: dict[str, Any]) -> dict[str, Any]:
        with _naming("prompt"):
            prompt_text = self.chat.render_prompt(row["prompt"])
        answers = {}
        for side in ("chosen", "rejected"):
            with _naming(side):
                answers[f"{side}_text"] = self.chat.render_answer(row["prompt"], prompt_text, row[side])
        return {
            **{name: row[name] for name in ("id", "source", "source_file", "source_row", "prompt")},
            "prompt_text": prompt_text,
            **answers,
        }

    def _control_tokens_in(self, table: pa.Table) -> list[str | None]:
        """For each row the first control token that one of its messages spells, as "side: token", or None."""
        frame = pl.from_arrow(table.select(["prompt", "chosen", "rejected"]))
        assert isinstance(frame, pl.DataFrame)
        tokens = pl.element().struct.field("content").str.extract_many(self.chat.control_tokens, leftmost=True)
        found = [
            pl.lit(f"{side}: ") + pl.col(side).list.eval(tokens.list.first().drop_nulls()).list.first()
            for side in frame.columns
        ]
        return frame.select(found=pl.coalesce(found))["found"].to_list()


@contextmanager
def _naming(side: str) -> Iterator[None]:
    """What the template says of a message is told with its side."""
    try:
        yield
    except jinja2.TemplateError as error:
        raise jinja2.TemplateRuntimeError(f"{side}: {error}") from error
