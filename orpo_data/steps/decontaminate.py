"""Removes pairs whose prompt is, or overlaps with, a question that models are judged on.

A question counts as contained when all of its words are the whole turn (exact), or when it shares a run of 13 words
with the turn, the customary length (GPT-3, arXiv 2005.14165, appendix C). A question shorter than that must be
contained as a whole, and one of a few words be the whole turn: "what is the capital of" proves nothing. Case,
punctuation and spacing do not count.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field, PlainSerializer, model_validator

from orpo_data.places import without_secrets
from orpo_data.schema import SIDES
from orpo_data.steps.evaluation_sets import EvaluationSet
from orpo_data.steps.near import normalised, words
from orpo_data.steps.notes import Rows, frame_of
from orpo_data.steps.sieve import Sieve
from orpo_data.steps.step import Step, StepOutput, divide
from orpo_data.steps.tokens import distinct

LONGEST_QUOTE = 240  # characters of a question, or of what is shared with it, in a detail
DETAIL = re.compile(r"(\w+): (.+) item (\d+); shared: ([^;]*); question: (.*)", re.DOTALL)

SetField = Annotated[
    EvaluationSet, PlainSerializer(lambda s: {"name": s.name, "items": len(s.items), "digest": s.digest})
]
"""An evaluation set; a step's configuration records the digest of its questions."""


class OverlapRules(BaseModel):
    """What counts as contamination."""

    subsets: list[str] = Field(
        default=[], description="Upstream subsets to drop as a whole, e.g. UltraFeedback's truthful_qa."
    )
    answers: bool = Field(default=False, description="Look into the assistant's turns as well.")
    ngram: int = Field(default=13, ge=2, description="Length in words of a shared run that counts as contamination.")
    min_words: int = Field(
        default=8, ge=1, description="Fewest words of a question shorter than `ngram` for which containing it counts."
    )

    @model_validator(mode="after")
    def _anchors_fit(self) -> Self:
        if self.min_words > self.ngram:
            raise ValueError(f"min_words ({self.min_words}) must not be above ngram ({self.ngram})")
        return self


class Overlap(NamedTuple):
    """What a dropped row shares with which question; its text is the row's detail."""

    side: str  # prompt, chosen or rejected
    set_name: str
    item: int  # 0-based, in the order of the set's files and rows
    shared: str  # the first run of words in common, in full
    question: str

    def __str__(self) -> str:
        shared, question = _shortened(self.shared), _shortened(self.question)
        return f"{self.side}: {self.set_name} item {self.item}; shared: {shared}; question: {question}"

    @classmethod
    def parse(cls, detail: str) -> Self | None:
        """The overlap behind a detail; None for one that tells of something else."""
        match = DETAIL.fullmatch(detail)
        return cls(match[1], match[2], int(match[3]), match[4], match[5]) if match else None


@dataclass(frozen=True, order=True)
class _Text:
    """One text of a question."""

    set_number: int
    item: int
    text: str

    @cached_property
    def words(self) -> list[str]:
        return words(self.text)


class _Hit(NamedTuple):
    """A run of words that a question's text shares with a turn."""

    question: _Text
    question_start: int
    start: int


class Decontaminate(OverlapRules, Step):
    """Drops pairs that overlap with an evaluation set, or stem from a subset that is one."""

    name: ClassVar[str] = "decontaminate"
    version: ClassVar[int] = 2

    sets: list[SetField] = Field(default=[], description="What the pairs are compared with.")

    def facts(self) -> dict[str, Any]:
        return {
            "evaluation_sets": [
                {
                    "name": s.name,
                    "items": len(s.items),
                    "digest": s.digest,
                    "path": without_secrets(s.path),
                    "revision": s.revision,
                }
                for s in self.sets
            ]
        }

    def apply(self, table: pa.Table) -> StepOutput:
        reasons, details = list[str | None]([None] * len(table)), list[str | None]([None] * len(table))
        suspects = self._suspects(table)
        columns = (table[name].take(suspects).to_pylist() for name in ("subset", *SIDES))
        for row, found in zip(suspects.tolist(), map(self._judge, *columns), strict=True):
            reasons[row], details[row] = found or (None, None)
        return StepOutput(*divide(self.name, table, pa.array(reasons, pa.string()), pa.array(details, pa.string())))

    def _suspects(self, table: pa.Table) -> Rows:
        """The rows that need a look: those of a listed subset, and those with a turn that may overlap."""
        found = [np.flatnonzero(pc.is_in(table["subset"], pa.array(self.subsets, pa.string())))]
        for side in SIDES:
            turns = frame_of(table, side).with_row_index("row").explode(side).unnest(side)
            judged = pl.col("content").is_not_null() & (self.answers | pl.col("role").ne_missing("assistant"))
            turns = turns.filter(judged).select(pl.col("row").cast(pl.Int64), "content")
            found.append(turns["row"].to_numpy()[self._sieve.passing(turns["content"])])
        return distinct(np.concatenate(found))

    def _judge(self, subset: str | None, *sides: list[dict[str, str]]) -> tuple[str, str] | None:
        """Reason and detail; an exact match is told before a shared run."""
        if subset in self.subsets:
            return "contaminated_subset", f"subset {subset}"
        turns = [
            (side, turn["content"])
            for side, messages in zip(SIDES, sides, strict=True)
            for turn in messages
            if self.answers or turn["role"] != "assistant"
        ]
        for reason, find in (("contaminated_exact", self._same), ("contaminated_ngram", self._shared)):
            for side, text in turns:
                if overlap := find(side, text):
                    return reason, str(overlap)
        return None

    def _same(self, side: str, text: str) -> Overlap | None:
        question = self._whole.get(normalised(text) or text.strip())
        return self._overlap(side, question, normalised(text)) if question else None

    def _shared(self, side: str, text: str) -> Overlap | None:
        """The first question, in the order of sets and items, that shares a long enough run with a turn."""
        found = words(text)
        hit = min(self._hits(found), default=None)
        return self._overlap(side, hit.question, " ".join(_extended(hit, found))) if hit else None

    def _overlap(self, side: str, question: _Text, shared: str) -> Overlap:
        return Overlap(side, self.sets[question.set_number].name, question.item, shared, question.text)

    def _hits(self, found: list[str]) -> Iterator[_Hit]:
        for start in range(len(found) - self.min_words + 1):
            for question, at, length in self._runs.get(" ".join(found[start : start + self.min_words]), ()):
                if found[start : start + length] == question.words[at : at + length]:
                    yield _Hit(question, at, start)

    @cached_property
    def _questions(self) -> list[_Text]:
        return [
            _Text(number, item, text)
            for number, evaluation_set in enumerate(self.sets)
            for item, texts in enumerate(evaluation_set.items)
            for text in texts
        ]

    @cached_property
    def _whole(self) -> dict[str, _Text]:
        """Questions by their normalised text, the first of equal ones."""
        return {normalised(q.text) or q.text.strip(): q for q in reversed(self._questions)}

    @cached_property
    def _runs(self) -> dict[str, list[tuple[_Text, int, int]]]:
        """Runs (question, start, length) that must not occur in a turn, by their first `min_words` words."""
        runs: dict[str, list[tuple[_Text, int, int]]] = defaultdict(list)
        for question in self._questions:
            length = min(self.ngram, len(question.words))
            for start in range(len(question.words) - length + 1 if length >= self.min_words else 0):
                first = " ".join(question.words[start : start + self.min_words])
                runs[first].append((question, start, length))
        return dict(runs)

    @cached_property
    def _sieve(self) -> Sieve:
        return Sieve(self._runs, self.min_words, self._whole)


def _extended(hit: _Hit, found: list[str]) -> list[str]:
    """The run of a hit with all the words after it that are shared too; the first hit of a question has none before."""
    theirs, start, at = hit.question.words, hit.start, hit.question_start
    length = 0
    while start + length < len(found) and at + length < len(theirs) and found[start + length] == theirs[at + length]:
        length += 1
    return found[start : start + length]


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE].rstrip() + " ..."
