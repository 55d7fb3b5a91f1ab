"""Fits pairs into the length limits without ever cutting a prompt's turn in two or emptying an answer."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jinja2
import pyarrow as pa
from pydantic import Field

from orpo_data.chat import Messages
from orpo_data.schema import TOKENIZED
from orpo_data.steps.chat_template import ChatField
from orpo_data.steps.step import Step, StepOutput, dropped_rows


@dataclass(frozen=True)
class Drop:
    reason: str
    detail: str


class Truncate(Step):
    """Drops whole oldest turns of long prompts, then cuts long answers at the end.

    A cut answer has no end of turn: the model must not learn to stop there.
    """

    name: ClassVar[str] = "truncate"
    version: ClassVar[int] = 1

    chat: ChatField = Field(description="Tokenizer and template, to measure a shortened prompt.")
    max_length: int = Field(description="Most tokens of prompt and answer together.")
    max_prompt_length: int = Field(description="Most tokens of a prompt; below max_length.")
    overlong_prompt: Literal["drop-turns", "drop"]
    overlong_response: Literal["truncate", "drop"]

    def apply(self, table: pa.Table) -> StepOutput:
        kept, failed, reasons, details, changed = [], [], [], [], 0
        for index, row in enumerate(table.to_pylist()):
            outcome = self._fit(row)
            if isinstance(outcome, Drop):
                failed.append(index)
                reasons.append(outcome.reason)
                details.append(outcome.detail)
                continue
            kept.append(outcome)
            changed += bool(
                outcome["prompt_turns_dropped"] or outcome["chosen_truncated"] or outcome["rejected_truncated"]
            )
        losers = table.take(pa.array(failed, pa.int64()))
        dropped = dropped_rows(self.name, losers, pa.array(reasons, pa.string()), pa.array(details, pa.string()))
        return StepOutput(pa.Table.from_pylist(kept, schema=TOKENIZED), dropped, changed=changed)

    def _fit(self, row: dict[str, Any]) -> dict[str, Any] | Drop:
        """The TOKENIZED row, or why there is none."""
        shortened = self._fit_prompt(row["prompt"], row["prompt_ids"])
        if isinstance(shortened, Drop):
            return shortened
        prompt_ids, turns_dropped = shortened
        room = self.max_length - len(prompt_ids)
        answers = {side: row[f"{side}_response_ids"] for side in ("chosen", "rejected")}
        cut = {side: len(ids) > room for side, ids in answers.items()}
        if self.overlong_response == "drop" and any(cut.values()):
            longest = max(len(ids) for ids in answers.values())
            return Drop("response_too_long", f"{longest} tokens, {room} left of max_length {self.max_length}")
        if answers["chosen"][:room] == answers["rejected"][:room]:
            return Drop("identical_after_truncation", f"the sides are the same in their first {room} tokens")
        return {
            "id": row["id"],
            "chosen_input_ids": prompt_ids + answers["chosen"][:room],
            "rejected_input_ids": prompt_ids + answers["rejected"][:room],
            "prompt_len": len(prompt_ids),
            "source": row["source"],
            "prompt_turns_dropped": turns_dropped,
            "chosen_truncated": cut["chosen"],
            "rejected_truncated": cut["rejected"],
        }

    def _fit_prompt(self, prompt: Messages, ids: list[int]) -> tuple[list[int], int] | Drop:
        """The prompt's ids within the limit and how many turns that cost; the system message always stays."""
        if len(ids) <= self.max_prompt_length:
            return ids, 0
        too_long = Drop("prompt_too_long", f"{len(ids)} tokens, at most {self.max_prompt_length}")
        if self.overlong_prompt == "drop":
            return too_long
        system = prompt[:1] if prompt[0]["role"] == "system" else []
        turns = prompt[len(system) :]
        for dropped in range(1, len(turns)):
            if turns[dropped]["role"] != "user":
                continue  # a conversation begins with the user
            try:
                text = self.chat.render_prompt(system + turns[dropped:])
            except jinja2.TemplateError as error:
                return Drop("refused_by_template", str(error))
            shorter = self.chat.encode_prompts([text])[0]
            if len(shorter) <= self.max_prompt_length:
                return shorter, dropped
        return too_long
