"""Text to token ids: the prompt once for both sides, each answer with its end of turn."""

from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from orpo_data.schema import DROPPED, ENCODED, SIDES
from orpo_data.steps.chat_template import ChatField
from orpo_data.steps.step import Step, StepOutput


class Tokenize(Step):
    """Encodes the rendered texts of a pair."""

    name: ClassVar[str] = "tokenize"
    version: ClassVar[int] = 2

    chat: ChatField = Field(description="Tokenizer and template.")

    def apply(self, table: pa.Table) -> StepOutput:
        columns = {name: table[name] for name in ENCODED.names if name in table.schema.names}
        prompts, chosen, rejected = (table[f"{side}_text"].combine_chunks() for side in SIDES)
        ids = self.chat.encode_pairs(prompts, chosen, rejected)
        columns |= zip(("prompt_ids", "chosen_response_ids", "rejected_response_ids"), ids, strict=True)
        return StepOutput(pa.table(columns).select(ENCODED.names).cast(ENCODED), DROPPED.empty_table())
