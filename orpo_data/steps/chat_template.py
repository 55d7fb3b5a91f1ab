"""Messages to text, by the tokenizer's chat template."""

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
    refuses the conversation.
    """

    name: ClassVar[str] = "chat_template"
    version: ClassVar[int] = 1

    chat: ChatField = Field(description="Tokenizer and template.")

    def apply(self, table: pa.Table) -> StepOutput:
        sides = self._sides_with_control_tokens(table)
        rendered, failed, reasons, details = [], [], [], []
        for index, (row, side) in enumerate(zip(table.to_pylist(), sides, strict=True)):
            reason, detail = ("control_token_in_text", side) if side else (None, None)
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
        prompt_text = self.chat.render_prompt(row["prompt"])
        return {
            **{name: row[name] for name in ("id", "source", "source_file", "source_row", "prompt")},
            "prompt_text": prompt_text,
            "chosen_text": self.chat.render_answer(row["prompt"], prompt_text, row["chosen"]),
            "rejected_text": self.chat.render_answer(row["prompt"], prompt_text, row["rejected"]),
        }

    def _sides_with_control_tokens(self, table: pa.Table) -> list[str | None]:
        """For each row the first side whose text holds a control token, or None."""
        frame = pl.from_arrow(table.select(["prompt", "chosen", "rejected"]))
        assert isinstance(frame, pl.DataFrame)
        has_control = pl.element().struct.field("content").str.contains_any(self.chat.control_tokens)
        sides = [pl.when(pl.col(side).list.eval(has_control).list.any()).then(pl.lit(side)) for side in frame.columns]
        return frame.select(side=pl.coalesce(sides))["side"].to_list()
