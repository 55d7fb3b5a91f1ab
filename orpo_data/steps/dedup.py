"""One row for each pair or prompt: exact duplicates, near-duplicates, and pairs that contradict each other.

Of a cluster the pair with the widest score margin stays; where margins are equal or there are no scores, the first by
source, file and row. So the order in which rows arrive decides nothing. Every dropped row is itself a duplicate of the
row that was kept for it: chains of near-duplicates are not followed, which would drop rows unlike anything that stays.
"""

import hashlib
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from orpo_data.steps.near import Index, Sketch, prompt_text
from orpo_data.steps.step import GlobalStep, Step, StepOutput, divide

RowKey = tuple[str, str, str, int]
"""id, source, source_file, source_row: what tells one row from all others."""

Verdict = tuple[str, str]
"""Reason and detail."""

KEY_COLUMNS = ["id", "source", "source_file", "source_row"]
LARGEST = 20  # clusters, and ids in each, that the manifest names


@dataclass(frozen=True)
class Row:
    """What the first pass keeps of a row."""

    key: RowKey
    margin: float | None  # score_chosen - score_rejected
    prompt: str  # hashes of the folded texts
    chosen: str
    rejected: str

    @property
    def rank(self) -> tuple[float, str, str, int, str]:
        """The row of the lowest rank stays."""
        row_id, source, file, number = self.key
        return (math.inf if self.margin is None else -self.margin, source, file, number, row_id)


@dataclass(frozen=True)
class Cluster:
    """A row that stays and the rows dropped for it, each with its similarity (None: an exact duplicate)."""

    kept: Row
    dropped: list[tuple[Row, float | None]]


class Unique(Step):
    """The second pass of `Dedup`: drops the rows it has a verdict on."""

    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 1

    verdicts: dict[RowKey, Verdict]
    clusters: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        return self.clusters

    def apply(self, table: pa.Table) -> StepOutput:
        keys = zip(*(table[name].to_pylist() for name in KEY_COLUMNS), strict=True)
        found = [self.verdicts.get(key, (None, None)) for key in keys]
        reasons, details = (pa.array([verdict[i] for verdict in found], pa.string()) for i in range(2))
        return StepOutput(*divide(self.name, table, reasons, details))


class Dedup(GlobalStep):
    """Keeps one row of each cluster of duplicates, and settles contradictions."""

    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 1

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

    def summarise(self, tables: Iterator[pa.Table]) -> Step:
        rows, sketches, index = list[Row](), dict[str, Sketch](), Index(self.near or 1)
        for content in (row for table in tables for row in table.to_pylist()):
            row = _row(content)
            rows.append(row)
            if self.near and self._text_key(row) not in sketches:
                sketches[self._text_key(row)] = index.sketch(*self._parts(content))
        verdicts = dict(self._contradictions(rows))
        clusters = self._clusters([row for row in rows if row.key not in verdicts], sketches, index)
        for cluster in clusters:
            verdicts |= {row.key: self._duplicate(cluster.kept, similarity) for row, similarity in cluster.dropped}
        return Unique(verdicts=verdicts, clusters=_facts(clusters))

    def _text_key(self, row: Row) -> str:
        return row.prompt if self.on == "prompt" else row.prompt + row.chosen + row.rejected

    def _parts(self, content: dict[str, Any]) -> list[str]:
        """What must be alike: the last question too, or a dialogue cut at two points would count twice."""
        *history, question = content["prompt"] or [{"content": ""}]
        prompt = [prompt_text(history), question["content"]]
        answers = [prompt_text(content[side]) for side in ("chosen", "rejected")]
        return prompt if self.on == "prompt" else prompt + answers

    def _contradictions(self, rows: list[Row]) -> Iterator[tuple[RowKey, Verdict]]:
        """A verdict on every row that another one on the same prompt contradicts and that is not to be kept."""
        if self.contradictions == "keep":
            return
        says: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for row in rows:
            says[row.prompt, row.chosen, row.rejected].append(row)
        for (prompt, chosen, rejected), supporters in says.items():
            against = says.get((prompt, rejected, chosen), []) if chosen != rejected else []
            wins = self.contradictions == "keep-majority" and len(supporters) > len(against)
            if against and not wins:
                first = min(against, key=lambda row: row.rank)
                detail = f"against {first.key[0]} ({len(supporters)} for, {len(against)} against; {_place(first)})"
                yield from ((row.key, ("contradiction", detail)) for row in supporters)

    def _clusters(self, rows: list[Row], sketches: dict[str, Sketch], index: Index) -> list[Cluster]:
        """Best row first: one like a row kept before goes to that row's cluster, any other is kept."""
        clusters = list[Cluster]()
        for first, *copies in _equal(rows, self._text_key if self.exact else lambda row: str(row.key)):
            sketch = sketches.get(self._text_key(first))
            # the most similar kept row, of several the best
            match = max(index.matches(sketch), key=lambda m: (m[1], -m[0]), default=None) if sketch else None
            if match:
                clusters[match[0]].dropped.extend((row, match[1]) for row in (first, *copies))
            else:
                clusters.append(Cluster(first, [(row, None) for row in copies]))
                if sketch:
                    index.add(sketch)
        return [cluster for cluster in clusters if cluster.dropped]

    def _duplicate(self, kept: Row, similarity: float | None) -> Verdict:
        if similarity is None:
            return f"duplicate_{self.on}", f"of {kept.key[0]} ({_place(kept)})"
        return "near_duplicate", f"of {kept.key[0]} (similarity {similarity:.2f}; {_place(kept)})"


def _row(content: dict[str, Any]) -> Row:
    scores = content["score_chosen"], content["score_rejected"]
    margin = scores[0] - scores[1] if None not in scores else math.nan
    return Row(
        key=tuple(content[name] for name in KEY_COLUMNS),
        margin=None if math.isnan(margin) else margin,
        **{side: _folded(content[side]) for side in ("prompt", "chosen", "rejected")},
    )


def _folded(turns: Iterable[dict[str, str]]) -> str:
    """Hash of the turns up to case, spacing and unicode form; punctuation counts, for `2 + 2` is not `2 * 2`."""
    parts = (part for turn in turns for part in (turn["role"], _fold(turn["content"])))
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _equal(rows: list[Row], key: Any) -> list[list[Row]]:
    """Rows of equal `key` together, by rank; the groups by the rank of their first."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.rank):
        groups[key(row)].append(row)
    return list(groups.values())


def _place(row: Row) -> str:
    """Where a row comes from: an exact duplicate has the id of the row that was kept for it."""
    _, source, file, number = row.key
    return f"row {number} of {source} {file}"


def _facts(clusters: list[Cluster]) -> dict[str, Any]:
    """How many clusters of which sizes, and who was dropped for whom in the largest, the best rows first."""
    sizes = Counter(1 + len(cluster.dropped) for cluster in clusters)
    largest = sorted(clusters, key=lambda cluster: -len(cluster.dropped))[:LARGEST]
    return {
        "clusters": len(clusters),
        "rows_in_clusters": sum(size * count for size, count in sizes.items()),
        "cluster_sizes": {str(size): count for size, count in sorted(sizes.items())},
        "largest_clusters": [
            {
                "size": 1 + len(cluster.dropped),
                "kept": cluster.kept.key[0],
                "dropped": [row.key[0] for row, _ in cluster.dropped[:LARGEST]],
            }
            for cluster in largest
        ],
    }
