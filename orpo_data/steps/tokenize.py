"""Text to token ids: the prompt once for both sides, each answer with its end of turn."""

from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from orpo_data.schema import DROPPED, ENCODED
from orpo_data.steps.chat_template import ChatField
from orpo_data.steps.step import Step, StepOutput


class Tokenize(Step):
    """Encodes the rendered texts of a pair."""

    name: ClassVar[str] = "tokenize"
    version: ClassVar[int] = 2

    chat: ChatField = Field(description="Tokenizer and template.")

    def apply(self, table: pa.Table) -> StepOutput:
        columns = {name: table[name] for name in ENCODED.names if name in table.schema.names}
        columns["prompt_ids"] = self.chat.encode_prompts(table["prompt_text"].combine_chunks())
        for side in ("chosen", "rejected"):
            columns[f"{side}_response_ids"] = self.chat.encode_answers(table[f"{side}_text"].combine_chunks())
        return StepOutput(pa.table(columns).select(ENCODED.names).cast(ENCODED), DROPPED.empty_table())
