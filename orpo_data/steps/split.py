"""Train and eval sides such that nothing held out was also trained on, and no row ever changes sides.

The side is drawn from the seed and the opening turn alone, so a prompt, and a dialogue cut at several points, stays as
a whole on one side whatever else the dataset holds. Openings are drawn on their own, so two of them that are alike may
come out on different sides; then the held-out row is not held out any more, and is dropped (`seen_in_train`).

Adding rows therefore moves no row to the other side: what was in train stays there, what was held out stays held out
or is dropped when its like arrives in train. No rule does better without remembering the earlier rows: a new row that
resembles one of each side has to cost somebody its place. This one costs at most the share held out, never train.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from orpo_data.hashing import leading_bits
from orpo_data.steps.alike import Sketches, across
from orpo_data.steps.draws import Seed, uniforms
from orpo_data.steps.minhash import sketches
from orpo_data.steps.near import keys_of, word_tokens
from orpo_data.steps.notes import (
    CONTENT,
    Rows,
    all_notes,
    first_equal,
    for_parts,
    frame_of,
    on_rows,
    text_of,
    values,
)
from orpo_data.steps.step import GlobalStep, Judgement, StepOutput, divide
from orpo_data.steps.tokens import Hashes, among, distinct

TRAIN, EVAL = "train", "eval"
SPLITS = [TRAIN, EVAL]
SEEN = "seen_in_train"


def opening_text(prompt: list[dict[str, str]]) -> str:
    """The first turn that is not the system's: a dialogue cut at several points keeps it."""
    return next((turn["content"] for turn in prompt if turn["role"] != "system"), "")


OPENING = (
    pl.col("prompt")
    .list.eval(CONTENT.filter(pl.element().struct.field("role") != "system"))
    .list.get(0, null_on_oob=True)
    .fill_null("")
)
"""`opening_text` of each row."""


class Split(GlobalStep):
    """Holds out a share of the prompts for evaluation.

    Each source has its share held out: with n openings and fraction f about n f, give or take sqrt(n f (1 - f)).
    """

    name: ClassVar[str] = "split"
    version: ClassVar[int] = 4

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
    seed: Seed = Field(default=42, description="Seed of the draw, one for each opening turn.")

    def note(self, table: pa.Table) -> pa.Table:
        """The side drawn for each row, hashes of its opening and its prompt, and a sketch of the prompt."""
        rows = frame_of(table, "prompt", "source")
        opening, prompt = rows.select(OPENING).to_series(), rows.select(text_of(pl.col("prompt"))).to_series()
        tokens = word_tokens(prompt)
        keys = keys_of(prompt, tokens)
        openings = _keys_of_openings(opening, prompt, keys)
        shares = rows["source"].replace_strict(self.eval_fractions, default=self.eval_fraction, return_dtype=pl.Float64)
        columns = {
            "id": table["id"],
            "source": table["source"],
            "held_out": pa.array(uniforms(self.seed, "split", openings) < shares.to_numpy()),
            "opening": pa.array(leading_bits(openings)),
            "prompt": pa.array(leading_bits(keys)),
        }
        return pa.table(columns | sketches([prompt], [tokens], self.near_duplicate))

    def judge(self, notes: Sequence[pa.Table]) -> Judgement:
        rows = all_notes(self, notes)
        drawn = values(rows, "held_out")
        held_out, train = np.flatnonzero(drawn), np.flatnonzero(~drawn)
        seen = _openings_seen(rows, held_out, train).fill_null(self._prompts_seen(rows, held_out, train))
        sides = pc.if_else(pa.array(drawn), EVAL, TRAIN)
        verdicts = pa.table({"split": sides, "detail": on_rows(len(rows), held_out, seen)})
        return Judgement(for_parts(notes, verdicts), {"sources": _mix(rows["source"], verdicts)})

    def apply(self, table: pa.Table, verdicts: pa.Table) -> StepOutput:
        """Add the column `split`, and drop held-out rows that train has seen."""
        verdicts = verdicts.combine_chunks()
        seen = pc.is_valid(verdicts["detail"])
        reasons = pc.if_else(seen, SEEN, pa.scalar(None, pa.string()))
        kept, dropped = divide(self.name, table, reasons, verdicts["detail"])
        return StepOutput(kept.append_column("split", verdicts["split"].filter(pc.invert(seen))), dropped)

    def _prompts_seen(self, rows: pa.Table, held_out: Rows, train: Rows) -> pl.Series:
        """For each held-out row the row of train with the prompt most like its own, as a detail."""
        keys = values(rows, "prompt")
        ours, theirs = (some[_first_ones(keys[some])] for some in (held_out, train))
        alike = across(Sketches(rows, self.near_duplicate), ours, theirs)
        pairs = {"prompt": keys[ours[alike.first]], "train": keys[theirs[alike.second]], "alike": alike.similarity}
        most = pl.DataFrame(pairs).filter(pl.col("alike") == pl.max("alike").over("prompt"))
        ids = _least_ids(rows, train, "prompt", most["train"])
        most = most.join(ids, left_on="train", right_on="prompt")
        most = most.group_by("prompt").agg(pl.min("id"), pl.first("alike"))
        details = [f"of {row_id} (similarity {alike:.2f})" for _, row_id, alike in most.iter_rows()]
        found = most.select("prompt", detail=pl.Series(details, dtype=pl.String))
        return _looked_up(pl.Series("prompt", keys[held_out]), found)["detail"]


def _keys_of_openings(openings: pl.Series, prompts: pl.Series, keys: pl.Series) -> pl.Series:
    """`key_of` each opening, from those of the prompts: a prompt of one turn is its opening."""
    others = (openings != prompts).arg_true()
    texts = openings.gather(others)
    return keys.clone().scatter(others, keys_of(texts, word_tokens(texts)))


def _openings_seen(rows: pa.Table, held_out: Rows, train: Rows) -> pl.Series:
    """For each held-out row a row of train with its opening, as a detail: sources may draw one opening differently."""
    opening = pl.Series("opening", values(rows, "opening")[held_out])
    ids = _least_ids(rows, train, "opening", opening)
    return _looked_up(opening, ids).select(pl.format("opening of {}", "id")).to_series()


def _least_ids(rows: pa.Table, some: Rows, key: str, wanted: pl.Series) -> pl.DataFrame:
    """The smallest id of the rows among `some` that have a wanted key, for each key."""
    having = some[among(values(rows, key)[some], distinct(wanted.to_numpy()))]
    return frame_of(rows.select([key, "id"]).take(having), key, "id").group_by(key).agg(pl.min("id"))


def _looked_up(keys: pl.Series, found: pl.DataFrame) -> pl.DataFrame:
    """A row for each key, of nulls where nothing was found for it."""
    return keys.to_frame().join(found, on=keys.name, how="left", maintain_order="left")


def _first_ones(keys: Hashes) -> Rows:
    return np.flatnonzero(first_equal(keys) == np.arange(len(keys)))


def _mix(sources: pa.ChunkedArray, verdicts: pa.Table) -> dict[str, dict[str, Any]]:
    """Rows of each source by what becomes of them, and its share of all that are kept."""
    outcomes = pc.if_else(pc.is_valid(verdicts["detail"]), SEEN, verdicts["split"])
    found = pl.DataFrame({"source": pl.Series(sources), "outcome": pl.Series(outcomes)}).group_by(pl.all()).len()
    counts = {source: dict.fromkeys([*SPLITS, SEEN], 0) for source in sorted(found["source"].unique())}
    for source, outcome, rows in found.iter_rows():
        counts[source][outcome] = rows
    kept = {source: of[TRAIN] + of[EVAL] for source, of in counts.items()}
    total = sum(kept.values()) or 1
    return {source: {**of, "share": round(kept[source] / total, 4)} for source, of in counts.items()}
