"""Fits pairs into the length limits without ever cutting a prompt's turn in two or emptying an answer."""

from collections.abc import Iterator
from itertools import islice
from typing import ClassVar, Literal

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from orpo_data.chat import Messages
from orpo_data.ragged import Counts, as_bytes, as_lists, join, keep, lengths, split
from orpo_data.schema import ENCODED_SIDES, TOKENIZED
from orpo_data.steps.chat_template import ChatField, Failed, set_aside
from orpo_data.steps.step import Step, StepOutput

Shorter = dict[int, tuple[bytes, int]]
"""By row: the ids of a prompt without its oldest turns, as bytes, and how many turns these were."""


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
        prompts, chosen, rejected = (table[name].combine_chunks() for name in ENCODED_SIDES)
        failed, shorter = self._fit_prompts(table["prompt"], lengths(prompts))
        prompts = _with(prompts, shorter)
        turns_dropped = np.zeros(len(table), np.int32)
        turns_dropped[list(shorter)] = [turns for _, turns in shorter.values()]
        room = np.maximum(self.max_length - lengths(prompts), 0)
        cut = [lengths(answers) > room for answers in (chosen, rejected)]
        if self.overlong_response == "drop":
            longest = np.maximum(lengths(chosen), lengths(rejected))
            for row in np.flatnonzero(longest > room).tolist():
                detail = f"{longest[row]} tokens, {room[row]} left of max_length {self.max_length}"
                failed.setdefault(row, ("response_too_long", detail))
        chosen, rejected = _first(chosen, room), _first(rejected, room)
        same = pc.equal(as_bytes(chosen), as_bytes(rejected)).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(same).tolist():
            detail = f"the sides are the same in their first {room[row]} tokens"
            failed.setdefault(row, ("identical_after_truncation", detail))
        fits, dropped = set_aside(self.name, table, failed)
        names = table.select(["id", "source"])
        if failed:
            mask = pa.array(fits)
            prompts, chosen, rejected = (keep(ids, mask) for ids in (prompts, chosen, rejected))
            names, turns_dropped, cut = names.filter(mask), turns_dropped[fits], [side[fits] for side in cut]
        ids = (join(prompts, chosen), join(prompts, rejected), pa.array(lengths(prompts), pa.int32()))
        columns = (names["id"], *ids, names["source"], turns_dropped, *cut)
        kept = pa.table(dict(zip(TOKENIZED.names, columns, strict=True)), schema=TOKENIZED)
        changed = int(((turns_dropped > 0) | cut[0] | cut[1]).sum())
        return StepOutput(kept, dropped, changed=changed)

    def _fit_prompts(self, prompts: pa.ChunkedArray, tokens: Counts) -> tuple[Failed, Shorter]:
        """What becomes of the prompts that are too long."""
        long = np.flatnonzero(tokens > self.max_prompt_length).tolist()
        detail = f"tokens, at most {self.max_prompt_length}"
        failed: Failed = {row: ("prompt_too_long", f"{tokens[row]} {detail}") for row in long}
        if self.overlong_prompt == "drop" or not long:
            return failed, {}
        shorter: Shorter = {}
        talks = prompts.take(pa.array(long)).to_pylist()
        waiting = {row: self._shortened(talk) for row, talk in zip(long, talks, strict=True)}
        most = 1  # candidates of each that are encoded together; the first one nearly always fits
        while waiting:
            tried: list[tuple[int, str, int]] = []
            for row, candidates in waiting.items():
                try:
                    tried.extend((row, *candidate) for candidate in islice(candidates, most))
                except jinja2.TemplateError as error:
                    failed[row] = ("refused_by_template", str(error))
            if not tried:
                break
            encoded = self.chat.encode_prompts(pa.array([text for _, text, _ in tried], pa.string()))
            fits = lengths(encoded) <= self.max_prompt_length
            for (row, _, turns), ids, fit in zip(tried, as_bytes(encoded).to_pylist(), fits, strict=True):
                if fit and row not in shorter:
                    del failed[row]
                    shorter[row] = ids, turns
            waiting = {row: waiting[row] for row, *_ in tried if row not in shorter}
            most *= 4
        return failed, shorter

    def _shortened(self, prompt: Messages) -> Iterator[tuple[str, int]]:
        """The prompt without its oldest turns, always fewer; the system message always stays."""
        system = prompt[:1] if prompt[0]["role"] == "system" else []
        turns = prompt[len(system) :]
        for dropped in range(1, len(turns)):
            if turns[dropped]["role"] == "user":  # a conversation begins with the user
                yield self.chat.write_prompt(system + turns[dropped:]), dropped


def _with(prompts: pa.ListArray, shorter: Shorter) -> pa.ListArray:
    """`prompts` with the shorter ones in their places."""
    mask = np.zeros(len(prompts), bool)
    mask[list(shorter)] = True
    own = pa.array([shorter[row][0] for row in sorted(shorter)], pa.binary())
    return as_lists(pc.replace_with_mask(as_bytes(prompts), pa.array(mask), own)) if shorter else prompts


def _first(ids: pa.ListArray, most: Counts) -> pa.ListArray:
    """Of each row the first ids, at most so many."""
    counts = lengths(ids)
    return split(ids, np.minimum(counts, most))[0] if (counts > most).any() else ids
