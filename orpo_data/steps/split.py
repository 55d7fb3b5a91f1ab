"""Train and eval sides such that nothing held out was also trained on.

Rows that share a prompt, or the opening turn of a dialogue, or have near-duplicate prompts form a group; a group goes
to one side as a whole. The side is drawn from (seed, group), so neither the order of the rows nor their number decides.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field
from rensa import RMinHash, RMinHashLSH

from orpo_data.schema import DROPPED
from orpo_data.steps.draws import uniform
from orpo_data.steps.step import GlobalStep, Step, StepOutput

TRAIN, EVAL = "train", "eval"
SPLITS = [TRAIN, EVAL]

SHINGLE_WORDS = 3
PERMUTATIONS = 128
BANDS = 32  # 4 rows a band: candidates above a Jaccard similarity of about 0.4, then compared with the threshold
WORD = re.compile(r"\w+")


def normalised(text: str) -> str:
    """Words only, case folded: what remains when punctuation, case and spacing are set aside."""
    return " ".join(WORD.findall(text.casefold()))


def key_of(text: str) -> str:
    """Hash of the normalised text; of the text itself where it has no words."""
    return hashlib.sha256((normalised(text) or text).encode()).hexdigest()[:32]


def prompt_text(prompt: list[dict[str, str]]) -> str:
    return "\n".join(turn["content"] for turn in prompt)


def opening_text(prompt: list[dict[str, str]]) -> str:
    """The first turn that is not the system's: a dialogue cut at several points keeps it."""
    return next((turn["content"] for turn in prompt if turn["role"] != "system"), "")


def shingles(text: str) -> list[str]:
    """Runs of three words; a shorter text is one run, one without words stands for itself."""
    words = normalised(text).split() or [text]
    return [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]


class Groups:
    """Union-find over keys; a group's name is its smallest key, whatever the order of the unions."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, key: str) -> str:
        root = key
        while (parent := self._parent.get(root, root)) != root:
            root = parent
        while key != root:
            self._parent[key], key = root, self._parent[key]
        return root

    def union(self, a: str, b: str) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        if low != high:
            self._parent[high] = low

    def names(self) -> dict[str, str]:
        """The group of every key that is not alone and not its group's name."""
        return {key: self.find(key) for key in self._parent}


class Assign(Step):
    """The second pass of `Split`: adds the column `split` to each row."""

    name: ClassVar[str] = "split"
    version: ClassVar[int] = 1

    eval_fraction: float
    seed: int
    groups: dict[str, str]

    def apply(self, table: pa.Table) -> StepOutput:
        sides = [self._side(prompt) for prompt in table["prompt"].to_pylist()]
        kept = table.append_column("split", pa.array(sides, pa.string()))
        return StepOutput(kept, DROPPED.empty_table())

    def _side(self, prompt: list[dict[str, str]]) -> str:
        key = key_of(prompt_text(prompt))
        group = self.groups.get(key, key)
        return EVAL if uniform(self.seed, "split", group) < self.eval_fraction else TRAIN


class Split(GlobalStep):
    """Holds out a share of the prompt groups for evaluation."""

    name: ClassVar[str] = "split"
    version: ClassVar[int] = 1

    eval_fraction: float = Field(default=0.02, ge=0, lt=1, description="Share of the prompt groups that is held out.")
    near_duplicate: float = Field(
        default=0.7, gt=0.4, le=1, description="Jaccard similarity of word 3-grams from which two prompts go together."
    )
    seed: int = Field(default=42, description="Seed of the draw, one for each group of prompts.")

    def summarise(self, tables: Iterator[pa.Table]) -> Step:
        groups, openings, seen = Groups(), dict[str, str](), list[str]()
        index: Any = RMinHashLSH(self.near_duplicate, PERMUTATIONS, BANDS)
        hashes: dict[str, Any] = {}
        for prompt in (prompt for table in tables for prompt in table["prompt"].to_pylist()):
            text = prompt_text(prompt)
            key = key_of(text)
            # before the shortcut: the same words may stand in other turns, and so have another opening
            groups.union(key, openings.setdefault(key_of(opening_text(prompt)), key))
            if key in hashes:
                continue
            minhash = hashes[key] = RMinHash(num_perm=PERMUTATIONS, seed=0)
            minhash.update(shingles(text))
            for other in index.query(minhash):
                if minhash.jaccard(hashes[seen[other]]) >= self.near_duplicate:
                    groups.union(key, seen[other])
            index.insert(len(seen), minhash)
            seen.append(key)
        return Assign(eval_fraction=self.eval_fraction, seed=self.seed, groups=groups.names())
