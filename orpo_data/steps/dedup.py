"""One row for each pair or prompt: exact duplicates, near-duplicates, and pairs that contradict each other.

Of a cluster the pair with the widest score margin stays; where margins are equal or there are no scores, the first by
source, file and row. So the order in which rows arrive decides nothing. Every dropped row is itself a duplicate of the
row that was kept for it: chains of near-duplicates are not followed, which would drop rows unlike anything that stays.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from orpo_data.schema import ANSWERS, SIDES
from orpo_data.steps.alike import Sketches, best_first
from orpo_data.steps.folds import message_hashes
from orpo_data.steps.minhash import sketches
from orpo_data.steps.near import word_tokens
from orpo_data.steps.notes import (
    ORIGIN,
    Rows,
    all_notes,
    first_equal,
    for_parts,
    frame_of,
    on_rows,
    origins,
    text_of,
    values,
)
from orpo_data.steps.step import GlobalStep, Judgement, StepOutput, divide
from orpo_data.steps.tokens import among, combined, distinct

LARGEST = 20  # clusters, and ids in each, that the manifest names


class Clusters(NamedTuple):
    """Rows to drop, each with the row that is kept for it: cluster by cluster, the best rows first."""

    dropped: Rows
    kept: Rows
    similarity: NDArray[np.float64]  # nan for an exact duplicate


class Dedup(GlobalStep):
    """Keeps one row of each cluster of duplicates, and settles contradictions."""

    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 3

    on: Literal["pair", "prompt"] = Field(
        default="pair", description="What must be alike: prompt, chosen and rejected, or the prompt alone."
    )
    exact: bool = Field(default=True, description="Drop what is equal up to case, spacing and unicode form.")
    near: float | None = Field(
        default=0.65,
        gt=0.4,
        le=1,
        description="Jaccard similarity of word 3-grams from which two rows count as near-duplicates; null keeps them.",
    )
    contradictions: Literal["drop", "keep-majority", "keep"] = Field(
        default="drop", description="What happens where one row prefers A to B and another B to A on the same prompt."
    )

    def note(self, table: pa.Table) -> pa.Table:
        """Where rows come from, their margins, hashes of their folded texts, and sketches of what must be alike."""
        rows = frame_of(table, *SIDES, "score_chosen", "score_rejected")
        margin = pl.col("score_chosen").cast(pl.Float64) - pl.col("score_rejected")
        columns = {name: table[name] for name in ORIGIN}
        columns["margin"] = rows.select(pl.when(margin.is_not_nan()).then(margin)).to_series().to_arrow()
        columns |= {side: pa.array(message_hashes(rows, side)) for side in SIDES}
        if self.near:
            parts = self._parts(rows)
            columns |= sketches(parts, [word_tokens(part) for part in parts], self.near)
        return pa.table(columns)

    def judge(self, notes: Sequence[pa.Table]) -> Judgement:
        rows = all_notes(self, notes)
        order = ranked(rows)
        contradicting, against = self._contradictions(rows, order)
        clusters = self._clusters(rows, order[~among(order, distinct(contradicting))])
        dropped = np.concatenate([contradicting, clusters.dropped])
        alike = np.where(np.isnan(clusters.similarity), f"duplicate_{self.on}", "near_duplicate")
        reasons = pl.Series(["contradiction"] * len(contradicting) + alike.tolist(), dtype=pl.String)
        details = pl.concat([against, _details(rows, clusters)])
        verdicts = {"reason": on_rows(len(rows), dropped, reasons), "detail": on_rows(len(rows), dropped, details)}
        return Judgement(for_parts(notes, pa.table(verdicts)), _facts(rows, clusters))

    def apply(self, table: pa.Table, verdicts: pa.Table) -> StepOutput:
        return StepOutput(*divide(self.name, table, *verdicts.select(["reason", "detail"]).combine_chunks().columns))

    def _parts(self, rows: pl.DataFrame) -> list[pl.Series]:
        """What must be alike: the last question too, or a dialogue cut at two points would count twice."""
        prompt = pl.col("prompt")
        history = text_of(prompt.list.head(pl.max_horizontal(prompt.list.len(), 1) - 1))
        parts = [history, prompt.list.last().struct.field("content")]
        if self.on == "pair":
            parts += [text_of(pl.col(side)) for side in ANSWERS]
        return [rows.select(part.fill_null("")).to_series() for part in parts]

    def _contradictions(self, rows: pa.Table, order: Rows) -> tuple[Rows, pl.Series]:
        """Every row that another one on the same prompt contradicts and that is not to be kept, and its detail."""
        hashes = [values(rows, side) for side in SIDES]
        says, opposite = combined(*hashes), combined(hashes[0], hashes[2], hashes[1])
        contested = order[(among(says, distinct(opposite)) & (says != opposite))[order]]
        if self.contradictions == "keep" or not len(contested):
            return contested[:0], pl.Series(dtype=pl.String)
        claims = pl.DataFrame({"row": contested, "claim": says[contested], "opposite": opposite[contested]})
        votes = claims.group_by("claim").agg(first=pl.first("row"), votes=pl.len())
        against = votes.rename({"claim": "opposite", "votes": "against"})
        lost = claims.join(votes.select("claim", "votes"), on="claim").join(against, on="opposite")
        if self.contradictions == "keep-majority":
            lost = lost.filter(pl.col("votes") <= pl.col("against"))
        first = origins(rows, lost["first"].to_numpy()).with_columns(lost["votes"], lost["against"])
        detail = pl.format("against {} ({} for, {} against; {})", "id", "votes", "against", PLACE)
        return lost["row"].to_numpy(), first.select(detail).to_series()

    def _clusters(self, rows: pa.Table, order: Rows) -> Clusters:
        """Of equal rows the first stays; of those left, best first, each that is like no row kept before."""
        texts = values(rows, "prompt") if self.on == "prompt" else combined(*(values(rows, side) for side in SIDES))
        first = first_equal(texts[order]) if self.exact else np.arange(len(order))
        stays, similarity = np.arange(len(order)), np.full(len(order), np.nan)
        if self.near:
            heads = np.flatnonzero(first == stays)
            gone, keeper, alike = best_first(Sketches(rows, self.near), order[heads])
            stays[heads[gone]], similarity[heads[gone]] = heads[keeper], alike
        keeper, similarity = stays[first], similarity[first]
        gone = np.flatnonzero(keeper != np.arange(len(order)))
        gone = gone[np.lexsort((gone, first[gone], keeper[gone]))]
        return Clusters(order[gone], order[keeper[gone]], similarity[gone])


# an exact duplicate has the id of the row that was kept for it, so the detail names its place
PLACE = pl.format("row {} of {} {}", "source_row", "source", "source_file")


def ranked(rows: pa.Table) -> Rows:
    """All rows, the best first."""
    margin = -values(rows, "margin", -np.inf)
    keys = [values(rows, "source_row"), *(_alphabetical(rows[name]) for name in ("source_file", "source")), margin]
    order = np.lexsort(keys)
    equal = np.flatnonzero(np.logical_and.reduce([key[order[1:]] == key[order[:-1]] for key in keys]))
    tied = order[np.union1d(equal, equal + 1)]
    if len(tied):  # several pairs from one record
        ids = np.zeros(len(rows), np.int64)
        ids[tied] = pl.Series(rows["id"].take(tied)).rank("dense").to_numpy()
        order = np.lexsort([ids, *keys])
    return order


def _alphabetical(texts: pa.ChunkedArray) -> NDArray[np.int32]:
    """The places of texts among the distinct ones, of which there are few."""
    places: NDArray[np.int32] = pc.index_in(texts, value_set=pc.unique(texts).sort()).to_numpy()
    return places


def _details(rows: pa.Table, clusters: Clusters) -> pl.Series:
    similar = ["" if math.isnan(value) else f"similarity {value:.2f}; " for value in clusters.similarity.tolist()]
    kept = origins(rows, clusters.kept).with_columns(pl.Series("similar", similar, pl.String))
    return kept.select(pl.format("of {} ({}{})", "id", "similar", PLACE)).to_series()


def _facts(rows: pa.Table, clusters: Clusters) -> dict[str, Any]:
    """How many clusters of which sizes, and who was dropped for whom in the largest, the best rows first."""
    starts = np.flatnonzero(np.diff(clusters.kept, prepend=-1))
    dropped = np.diff(starts, append=len(clusters.kept))
    sizes, counts = np.unique(dropped + 1, return_counts=True)
    largest = np.argsort(-dropped, kind="stable")[:LARGEST].tolist()
    return {
        "clusters": len(starts),
        "rows_in_clusters": int((sizes * counts).sum()),
        "cluster_sizes": dict(zip(map(str, sizes.tolist()), counts.tolist(), strict=True)),
        "largest_clusters": [_named(rows, clusters, starts[i], int(dropped[i])) for i in largest],
    }


def _named(rows: pa.Table, clusters: Clusters, start: int, dropped: int) -> dict[str, Any]:
    some = clusters.dropped[start : start + min(dropped, LARGEST)]
    kept, *ids = rows["id"].take([clusters.kept[start], *some]).to_pylist()
    return {"size": 1 + dropped, "kept": kept, "dropped": ids}
