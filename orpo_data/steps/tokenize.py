"""Text to token ids: the prompt once for both sides, each answer with its end of turn."""

from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from orpo_data.schema import DROPPED, ENCODED, ENCODED_SIDES, SIDES, no_rows
from orpo_data.steps.chat_template import ChatField
from orpo_data.steps.step import Step, StepOutput


class Tokenize(Step):
    """Encodes the rendered texts of a pair."""

    name: ClassVar[str] = "tokenize"
    version: ClassVar[int] = 2

    chat: ChatField = Field(description="Tokenizer and template.")

    def apply(self, table: pa.Table) -> StepOutput:
        prompts, chosen, rejected = (table[f"{side}_text"].combine_chunks() for side in SIDES)
        ids = dict(zip(ENCODED_SIDES, self.chat.encode_pairs(prompts, chosen, rejected), strict=True))
        columns = {name: ids[name] if name in ids else table[name] for name in ENCODED.names}
        return StepOutput(pa.table(columns, schema=ENCODED), no_rows(DROPPED))
