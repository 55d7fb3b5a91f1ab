"""Train and eval sides such that nothing held out was also trained on, and no row ever changes sides.

The side is drawn from the seed and the opening turn alone, so a prompt, and a dialogue cut at several points, stays as
a whole on one side whatever else the dataset holds. Openings are drawn on their own, so two of them that are alike may
come out on different sides; then the held-out row is not held out any more, and is dropped (`seen_in_train`).

Adding rows therefore moves no row to the other side: what was in train stays there, what was held out stays held out
or is dropped when its like arrives in train. No rule does better without remembering the earlier rows: a new row that
resembles one of each side has to cost somebody its place. This one costs at most the share held out, never train.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pyarrow as pa
from pydantic import Field

from orpo_data.steps.draws import uniform
from orpo_data.steps.near import Index, Sketch, key_of, prompt_text
from orpo_data.steps.step import GlobalStep, Step, StepOutput, divide

TRAIN, EVAL = "train", "eval"
SPLITS = [TRAIN, EVAL]
SEEN = "seen_in_train"

Messages = list[dict[str, str]]


def opening_text(prompt: Messages) -> str:
    """The first turn that is not the system's: a dialogue cut at several points keeps it."""
    return next((turn["content"] for turn in prompt if turn["role"] != "system"), "")


@dataclass(frozen=True)
class Seen:
    """What of the held-out side train has seen, and in which of its rows."""

    openings: dict[str, str]  # by key of an opening: the id of a train row
    prompts: dict[str, str]  # by key of a prompt: a near-duplicate, as a detail

    def detail(self, opening: str, prompt: str) -> str | None:
        if opening in self.openings:
            return f"opening of {self.openings[opening]}"
        return self.prompts.get(prompt)


class Split(GlobalStep):
    """Holds out a share of the prompts for evaluation.

    Each source has its share held out: with n openings and fraction f about n f, give or take sqrt(n f (1 - f)).
    """

    name: ClassVar[str] = "split"
    version: ClassVar[int] = 2

    eval_fraction: float = Field(default=0.02, ge=0, lt=1, description="Share of the openings that is held out.")
    eval_fractions: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default={}, description="The same for single sources by name; the others keep `eval_fraction`."
    )
    near_duplicate: float = Field(
        default=0.7,
        gt=0.4,
        le=1,
        description="Jaccard similarity of word 3-grams from which train has seen a held-out prompt.",
    )
    seed: int = Field(default=42, description="Seed of the draw, one for each opening turn.")

    def side(self, source: str, opening: str) -> str:
        """The side of a row by its source and the key of its opening."""
        fraction = self.eval_fractions.get(source, self.eval_fraction)
        return EVAL if uniform(self.seed, "split", opening) < fraction else TRAIN

    def summarise(self, tables: Iterator[pa.Table]) -> Step:
        sides = {side: _Prompts(self.near_duplicate) for side in SPLITS}
        alike: dict[str, list[tuple[str, float]]] = defaultdict(list)  # by held-out prompt: those of train
        rows = Counter[tuple[str, str, str, str]]()
        for source, row_id, prompt in _rows(tables):
            opening, key = key_of(opening_text(prompt)), key_of(prompt_text(prompt))
            side = self.side(source, opening)
            rows[source, side, opening, key] += 1
            if sketch := sides[side].add(key, opening, row_id, prompt):
                for other, similarity in sides[TRAIN if side == EVAL else EVAL].like(sketch):
                    held_out, train = (key, other) if side == EVAL else (other, key)
                    alike[held_out].append((train, similarity))
        seen = _seen(sides[TRAIN], sides[EVAL], alike)
        return Assign(split=self, seen=seen, sources=_count(rows, seen))


class _Prompts:
    """The distinct prompts and openings of one side, each with the smallest id of its rows."""

    def __init__(self, near_duplicate: float) -> None:
        self.prompts: dict[str, str] = {}
        self.openings: dict[str, str] = {}
        self._index = Index(near_duplicate)
        self._keys: list[str] = []

    def add(self, key: str, opening: str, row_id: str, prompt: Messages) -> Sketch | None:
        """Add a row; the sketch of its prompt if that was not there yet."""
        known = key in self.prompts
        self.prompts[key] = min(row_id, self.prompts.get(key, row_id))
        self.openings[opening] = min(row_id, self.openings.get(opening, row_id))
        if known:
            return None
        sketch = self._index.sketch(prompt_text(prompt))
        self._index.add(sketch)
        self._keys.append(key)
        return sketch

    def like(self, sketch: Sketch) -> Iterator[tuple[str, float]]:
        """Key and similarity of every prompt that is a near-duplicate."""
        return ((self._keys[number], similarity) for number, similarity in self._index.matches(sketch))


class Assign(Step):
    """The second pass of `Split`: adds the column `split`, and drops held-out rows that train has seen."""

    name: ClassVar[str] = "split"
    version: ClassVar[int] = 2

    split: Split
    seen: Seen
    sources: dict[str, dict[str, int]]

    def facts(self) -> dict[str, Any]:
        """The mix: rows of each source on each side, and its share of all that are kept."""
        kept = {source: counts[TRAIN] + counts[EVAL] for source, counts in self.sources.items()}
        total = sum(kept.values()) or 1
        return {"sources": {s: {**self.sources[s], "share": round(kept[s] / total, 4)} for s in self.sources}}

    def apply(self, table: pa.Table) -> StepOutput:
        sides, details = list[str](), list[str | None]()
        for source, _, prompt in _rows(iter([table])):
            opening = key_of(opening_text(prompt))
            side = self.split.side(source, opening)
            sides.append(side)
            details.append(self.seen.detail(opening, key_of(prompt_text(prompt))) if side == EVAL else None)
        reasons = [SEEN if detail else None for detail in details]
        kept, dropped = divide(self.name, table, pa.array(reasons, pa.string()), pa.array(details, pa.string()))
        left = [side for side, reason in zip(sides, reasons, strict=True) if not reason]
        return StepOutput(kept.append_column("split", pa.array(left, pa.string())), dropped)


def _rows(tables: Iterator[pa.Table]) -> Iterator[tuple[str, str, Messages]]:
    """source, id and prompt of every row."""
    for table in tables:
        yield from zip(*(table[name].to_pylist() for name in ("source", "id", "prompt")), strict=True)


def _seen(train: _Prompts, held_out: _Prompts, alike: dict[str, list[tuple[str, float]]]) -> Seen:
    """For each held-out prompt the most similar one of train; several sources may draw one opening differently."""
    openings = {opening: row_id for opening, row_id in train.openings.items() if opening in held_out.openings}
    prompts = {}
    for key, matches in alike.items():
        similarity, row_id = min((-similarity, train.prompts[match]) for match, similarity in matches)
        prompts[key] = f"of {row_id} (similarity {-similarity:.2f})"
    return Seen(openings, prompts)


def _count(rows: Counter[tuple[str, str, str, str]], seen: Seen) -> dict[str, dict[str, int]]:
    """Rows of each source by what becomes of them."""
    counts = {source: dict.fromkeys([*SPLITS, SEEN], 0) for source in sorted({source for source, *_ in rows})}
    for (source, side, opening, prompt), number in rows.items():
        counts[source][SEEN if side == EVAL and seen.detail(opening, prompt) else side] += number
    return counts
