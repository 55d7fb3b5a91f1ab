"""How likely a preference is mislabelled, judged without a reward model: a score to sort and to look by.

Over a quarter of HH-RLHF's pairs have low or no agreement with a committee of reward models (arXiv 2410.01957). The
signals here are cheap and weak, each with a reason for which it is often wrong. So nothing is dropped: rows are scored,
and flagged above a threshold if one is set.

    label_noise = 1 - (1 - w1 s1) (1 - w2 s2) ...        signals s and their weights w, all in 0..1

No signal gives 0, more signals a higher score, none alone more than its weight. The signals:

contradiction  Other pairs prefer these two answers the other way round, on the same prompt or one nearly the same:
               their share among all pairs of the two. 1 to 1 gives 0.5, which is then the chance of being wrong.
disagreement   Pairs of one of the two answers and a third: the share in which chosen lost or rejected won. Weak, for
               the second best answer rightly beats some and loses to others.
margin         Chosen's score leads by less than the median of its source, or not at all: 1 - margin / median, in 0..1.
refusal        Chosen opens with a refusal, rejected does not. Right in most harmlessness data: weigh it 0 there.
alike          The answers share most of their words: 2 * shared / all - 1. Two that say the same are a toss of a coin,
               so it weighs 0.5. Wrong where one word decides, as in a sum.
short          Chosen is less than half as long as rejected: 1 - 2 * chosen / rejected, in characters. Wrong where
               brevity was asked for.
"""

from collections.abc import Sequence
from functools import reduce
from operator import mul
from typing import ClassVar

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from orpo_data.hashing import leading_bits
from orpo_data.schema import ANSWERS, DROPPED, no_rows
from orpo_data.steps.alike import Sketches, chains
from orpo_data.steps.answers import alike, hashes_and_words
from orpo_data.steps.flags import arrow, judged, rows_by_rule
from orpo_data.steps.minhash import sketches
from orpo_data.steps.near import keys_of, word_tokens
from orpo_data.steps.notes import Rows, all_notes, first_equal, frame_of, values
from orpo_data.steps.rules.content import Refusal
from orpo_data.steps.rules.rule import pair_texts, quotient, text
from orpo_data.steps.step import GlobalStep, Judgement, StepOutput
from orpo_data.steps.tokens import Hashes

MEASURED = ("margin", "refusal", "alike", "ratio")
VOTES = ("agreeing", "opposed", "chosen_won", "chosen_lost", "rejected_won", "rejected_lost")


class Weights(BaseModel):
    """What each signal alone can make of the score; 0 leaves it out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contradiction: float = Field(default=1.0, ge=0, le=1, description="Of pairs that say the opposite.")
    disagreement: float = Field(default=0.3, ge=0, le=1, description="Of pairs with one of the two answers.")
    margin: float = Field(default=0.3, ge=0, le=1, description="Of a small difference of the scores.")
    refusal: float = Field(default=0.3, ge=0, le=1, description="Of a refusal that was preferred to an answer.")
    alike: float = Field(default=0.5, ge=0, le=1, description="Of two answers in nearly the same words.")
    short: float = Field(default=0.3, ge=0, le=1, description="Of a much shorter answer that was preferred.")


class LabelNoise(GlobalStep):
    """Scores every pair by signals within it and among pairs on the same prompt; drops nothing."""

    name: ClassVar[str] = "label_noise"
    version: ClassVar[int] = 4

    weights: Weights = Weights()
    near: float | None = Field(
        default=0.8,
        gt=0.4,
        le=1,
        description="Jaccard similarity of word 3-grams from which two prompts ask the same; null: only equal ones.",
    )
    flag_above: float | None = Field(
        default=None, ge=0, le=1, description="Flag rows whose score is above this; null flags none."
    )

    def note(self, table: pa.Table) -> pa.Table:
        """What counts of each of the JUDGED rows; an answer is the hash of its folded text."""
        pairs = pair_texts(table)
        prompt = pairs["prompt_text"]
        tokens = word_tokens(prompt)
        keys = pa.array(leading_bits(keys_of(prompt, tokens)))
        columns = {"source": table["source"], "prompt": keys} | _measured(pairs)
        return pa.table(columns | (sketches([prompt], [tokens], self.near) if self.near else {}))

    def judge(self, notes: Sequence[pa.Table]) -> Judgement:
        rows = all_notes(self, notes)
        asked = self._asked(rows)
        votes = _votes(asked, values(rows, "chosen"), values(rows, "rejected"))
        medians = frame_of(rows, "source", "margin").group_by("source").agg(median=pl.median("margin"))
        verdicts, start = [], 0
        for part in notes:
            own = votes.filter(pl.col("row").is_between(start, start + len(part), closed="left"))
            verdicts.append(self._scores(part, own.with_columns(pl.col("row") - start), medians))
            start += len(part)
        _, pairs = np.unique(asked, return_counts=True)
        facts = {
            "prompts_with_several_pairs": int((pairs > 1).sum()),
            "contradicted_pairs": votes.filter(pl.col("opposed") > 0).height,
        }
        return Judgement(verdicts, facts)

    def _scores(self, notes: pa.Table, votes: pl.DataFrame, medians: pl.DataFrame) -> pa.Table:
        rows = frame_of(notes, "source", *MEASURED).with_row_index("row")
        rows = rows.join(votes, on="row", how="left", maintain_order="left")
        rows = rows.join(medians, on="source", how="left", maintain_order="left")
        rows = rows.with_columns(pl.col(VOTES).fill_null(0))
        trusted = [1 - getattr(self.weights, name) * signal for name, signal in SIGNALS.items()]
        scores = rows.select(label_noise=1 - reduce(mul, trusted))
        return pa.table({"label_noise": arrow(scores["label_noise"], pa.float64())})

    def apply(self, table: pa.Table, verdicts: pa.Table) -> StepOutput:
        """Write the column `label_noise`, and flags."""
        rows = frame_of(verdicts, "label_noise").with_row_index("row")
        above = pl.lit(False) if self.flag_above is None else pl.col("label_noise") > self.flag_above
        flagged = rows.filter(above).select("row", rule=pl.lit(self.name), side=pl.lit("both"), value="label_noise")
        kept = judged(table, flagged, [self.name])
        noise = kept.schema.get_field_index("label_noise")
        kept = kept.set_column(noise, kept.schema.field(noise), arrow(rows["label_noise"], pa.float32()))
        return StepOutput(kept, no_rows(DROPPED), flagged=rows_by_rule(flagged))

    def _asked(self, rows: pa.Table) -> Rows:
        """A number for each row, the same where the prompts ask the same."""
        first = first_equal(values(rows, "prompt"))
        if not self.near:
            return first
        heads = np.flatnonzero(first == np.arange(len(rows)))
        asked = np.empty(len(rows), np.int64)
        asked[heads] = chains(Sketches(rows, self.near), heads)
        return asked[first]


def _measured(pairs: pl.DataFrame) -> dict[str, pa.Array]:
    """What counts of a pair on its own; an answer is the hash of its folded text."""
    lengths = {side: text(side).str.len_chars() for side in ANSWERS}
    margin = pl.col("score_chosen").cast(pl.Float64) - pl.col("score_rejected")
    refusal = Refusal()
    found = pairs.select(
        margin=pl.when(margin.is_finite()).then(margin),
        refusal=(refusal.measure("chosen") & ~refusal.measure("rejected")).cast(pl.Float64),
        ratio=quotient(lengths["chosen"], lengths["rejected"]).fill_nan(1.0),
    )
    columns = {name: arrow(found[name], pa.float64()) for name in found.columns}
    chosen, words = hashes_and_words(pairs["chosen_text"])
    rejected, others = hashes_and_words(pairs["rejected_text"])
    answers = {"chosen": chosen, "rejected": rejected, "alike": alike(words, others, len(pairs))}
    return columns | {name: pa.array(column) for name, column in answers.items()}


def _votes(asked: Rows, chosen: Hashes, rejected: Hashes) -> pl.DataFrame:
    """Of rows on prompts with several pairs how often the answers won (were chosen) and lost, in any pair of two.

    The other rows have none but their own vote, which tells nothing: they are left out.
    """
    several = np.flatnonzero((np.bincount(asked)[asked] > 1) & (chosen != rejected))
    columns = {"row": several, "prompt": asked[several], "chosen": chosen[several], "rejected": rejected[several]}
    rows = pl.DataFrame(columns)
    pairs = rows.group_by("prompt", "chosen", "rejected").len("agreeing")
    won = pairs.group_by("prompt", answer="chosen").agg(won=pl.sum("agreeing"))
    lost = pairs.group_by("prompt", answer="rejected").agg(lost=pl.sum("agreeing"))
    rows = rows.join(pairs, on=["prompt", "chosen", "rejected"], how="left")
    opposite = pairs.select("prompt", chosen="rejected", rejected="chosen", opposed="agreeing")
    rows = rows.join(opposite, on=["prompt", "chosen", "rejected"], how="left")
    for side in ANSWERS:
        for votes, name in ((won, "won"), (lost, "lost")):
            votes = votes.rename({"answer": side, name: f"{side}_{name}"})
            rows = rows.join(votes, on=["prompt", side], how="left")
    return rows.select("row", pl.col(VOTES).fill_null(0).cast(pl.Int64))


def _share(part: pl.Expr, other: pl.Expr) -> pl.Expr:
    return pl.when(part > 0).then(part / (part + other)).otherwise(0.0)


SIGNALS = {
    "contradiction": _share(pl.col("opposed"), pl.col("agreeing")),
    # a pair of the same two answers counts in both of its answers' figures
    "disagreement": _share(
        pl.col("chosen_lost") + pl.col("rejected_won") - 2 * pl.col("opposed"),
        pl.col("chosen_won") + pl.col("rejected_lost") - 2 * pl.col("agreeing"),
    ),
    "margin": pl.when(pl.col("margin") <= 0)
    .then(1.0)
    .when(pl.col("median") <= 0)  # most pairs of the source have the wrong sign, so this one stands out
    .then(0.0)
    .otherwise((1 - pl.col("margin") / pl.col("median")).clip(0, 1).fill_null(0.0)),
    "refusal": pl.col("refusal"),
    "alike": (2 * pl.col("alike") - 1).clip(0, 1),
    "short": (1 - 2 * pl.col("ratio")).clip(0, 1),
}
"""Signals over what was measured of a row, its votes and the median margin of its source, each in 0..1."""
