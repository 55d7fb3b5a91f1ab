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

from collections.abc import Iterator
from functools import reduce
from operator import mul
from typing import Any, ClassVar

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from orpo_data.schema import DROPPED, JUDGED
from orpo_data.steps.flags import arrow, judged, rows_by_rule
from orpo_data.steps.near import Groups, key_of, near_groups
from orpo_data.steps.rules.content import Refusal
from orpo_data.steps.rules.folding import folded
from orpo_data.steps.rules.rule import ANSWERS, pair_texts, text
from orpo_data.steps.step import GlobalStep, Step, StepOutput

ROW = ["id", "source", "source_file", "source_row"]


class Weights(BaseModel):
    """What each signal alone can make of the score; 0 leaves it out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contradiction: float = Field(default=1.0, ge=0, le=1, description="Of pairs that say the opposite.")
    disagreement: float = Field(default=0.3, ge=0, le=1, description="Of pairs with one of the two answers.")
    margin: float = Field(default=0.3, ge=0, le=1, description="Of a small difference of the scores.")
    refusal: float = Field(default=0.3, ge=0, le=1, description="Of a refusal that was preferred to an answer.")
    alike: float = Field(default=0.5, ge=0, le=1, description="Of two answers in nearly the same words.")
    short: float = Field(default=0.3, ge=0, le=1, description="Of a much shorter answer that was preferred.")


class Score(Step):
    """The second pass of `LabelNoise`: writes the column `label_noise`."""

    name: ClassVar[str] = "label_noise"
    version: ClassVar[int] = 1

    flag_above: float | None
    scores: pl.DataFrame  # ROW and label_noise
    found: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        return self.found

    def apply(self, table: pa.Table) -> StepOutput:
        rows = pl.DataFrame(table.select(ROW)).join(self.scores, on=ROW, how="left", maintain_order="left")
        above = pl.lit(False) if self.flag_above is None else pl.col("label_noise") > self.flag_above
        flagged = rows.with_row_index("row").filter(above)
        flagged = flagged.select("row", rule=pl.lit(self.name), side=pl.lit("both"), value="label_noise")
        kept = judged(table, flagged, [self.name])
        noise = kept.schema.get_field_index("label_noise")
        kept = kept.set_column(noise, kept.schema.field(noise), arrow(rows["label_noise"], pa.float32()))
        return StepOutput(kept, DROPPED.empty_table(), flagged=rows_by_rule(flagged))


class LabelNoise(GlobalStep):
    """Scores every pair by signals within it and among pairs on the same prompt; drops nothing."""

    name: ClassVar[str] = "label_noise"
    version: ClassVar[int] = 1

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

    def summarise(self, tables: Iterator[pa.Table]) -> Step:
        """Scores from all JUDGED rows; neither their order nor their batches matter."""
        rows = pl.concat([_measure(JUDGED.empty_table()), *map(_measure, tables)])
        groups = near_groups(rows["prompt"], self.near) if self.near else Groups()
        asked = pl.Series("prompt", [groups.find(key_of(prompt)) for prompt in rows["prompt"]], pl.String)
        rows = _with_votes(rows.with_columns(asked))
        trusted = [1 - getattr(self.weights, name) * signal for name, signal in SIGNALS.items()]
        scores = rows.with_columns(label_noise=1 - reduce(mul, trusted))
        found = {
            "prompts_with_several_pairs": scores.group_by("prompt").len().filter(pl.col("len") > 1).height,
            "contradicted_pairs": scores.filter(pl.col("opposed") > 0).height,
        }
        return Score(flag_above=self.flag_above, scores=scores.select(*ROW, "label_noise").unique(ROW), found=found)


def _measure(table: pa.Table) -> pl.DataFrame:
    """What of each row counts; an answer is the hash of its folded text."""
    own = {name: pl.Series(name, table[name]) for name in ROW}
    lengths = {side: text(side).str.len_chars() for side in ANSWERS}
    words = {side: folded(text(side)).str.split(" ").list.unique() for side in ANSWERS}
    margin = pl.col("score_chosen").cast(pl.Float64) - pl.col("score_rejected")
    refusal = Refusal()
    return pair_texts(table).select(
        **own,
        prompt=text("prompt"),
        **{side: folded(text(side)).hash() for side in ANSWERS},
        margin=pl.when(margin.is_finite()).then(margin),
        refusal=(refusal.measure("chosen") & ~refusal.measure("rejected")).cast(pl.Float64),
        alike=words["chosen"].list.set_intersection(words["rejected"]).list.len()
        / words["chosen"].list.set_union(words["rejected"]).list.len(),
        ratio=(lengths["chosen"] / lengths["rejected"]).fill_nan(1.0),
    )


def _with_votes(rows: pl.DataFrame) -> pl.DataFrame:
    """Each row with how often, on its prompt, its answers won (were chosen) and lost, in any pair of two answers."""
    differ = pl.col("chosen") != pl.col("rejected")
    pairs = rows.filter(differ).group_by("prompt", "chosen", "rejected").len("agreeing")
    won = pairs.group_by("prompt", answer="chosen").agg(won=pl.sum("agreeing"))
    lost = pairs.group_by("prompt", answer="rejected").agg(lost=pl.sum("agreeing"))
    counted = rows.join(pairs, on=["prompt", "chosen", "rejected"], how="left")
    opposite = pairs.select("prompt", chosen="rejected", rejected="chosen", opposed="agreeing")
    counted = counted.join(opposite, on=["prompt", "chosen", "rejected"], how="left")
    for side in ANSWERS:
        for votes, name in ((won, "won"), (lost, "lost")):
            votes = votes.rename({"answer": side, name: f"{side}_{name}"})
            counted = counted.join(votes, on=["prompt", side], how="left")
    counts = pl.col("agreeing", "opposed", "^(chosen|rejected)_(won|lost)$").fill_null(0).cast(pl.Int64)
    return counted.with_columns(pl.when(differ).then(counts).otherwise(0))


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
    .otherwise((1 - pl.col("margin") / pl.median("margin").over("source")).clip(0, 1).fill_null(0.0)),
    "refusal": pl.col("refusal"),
    "alike": (2 * pl.col("alike") - 1).clip(0, 1),
    "short": (1 - 2 * pl.col("ratio")).clip(0, 1),
}
"""Signals over the rows of `_with_votes`, each in 0..1."""
