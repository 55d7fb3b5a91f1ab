"""What happened to a dataset, to a row and to a raw file, read back from the manifests and the shards themselves."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from orpo_data.chain import Node, origins, read_chain
from orpo_data.errors import OrpoError, UsageError
from orpo_data.explain import explain
from orpo_data.manifest import StepCounts, read_manifest
from orpo_data.places import as_path
from orpo_data.schema import ORIGIN_COLUMNS

MOST_IDS = 20
ROW_ID = re.compile(r"\b[0-9a-f]{32}\b")


@dataclass(frozen=True)
class Origin:
    """A record of a raw file."""

    source: str
    file: str
    row: int

    @property
    def line(self) -> int:
        """1-based: the line of a file of JSON lines, the record's number in any other."""
        return self.row + 1


@dataclass(frozen=True)
class Verdict:
    """What one step made of a row, with the values that decided: those of the step's own columns and draws."""

    step: str
    kept: bool
    reason: str | None = None
    detail: str | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What one stage made of a row: `id` is the row's as it came out or fell, `steps` end with the one that dropped it.

    A record of which several rows were made has a decision for each.
    """

    stage: str
    path: Path
    id: str | None  # null where the record could not be parsed
    kept: bool
    split: str | None
    steps: tuple[Verdict, ...]

    @property
    def step(self) -> str | None:
        """The step that dropped the row."""
        return None if self.kept else self.steps[-1].step

    @property
    def reason(self) -> str | None:
        return None if self.kept else self.steps[-1].reason


@dataclass(frozen=True)
class RowLineage:
    """A row's raw origin and every decision made on it, in the order of the stages.

    `related` are the rows, with their own lineage, that a step named when it dropped this one: the row it was a
    duplicate of, one that contradicts it, or one of train that is like it.
    """

    id: str | None
    origin: Origin
    decisions: tuple[Decision, ...]
    related: tuple["RowLineage", ...] = ()


@dataclass(frozen=True)
class Lineage:
    """The chain from the raw files to a dataset, first stage first, and the rows asked for.

    `ends`, where a raw file was asked for, has one line for each row made of it and says where that row ended:
    source, source_file, source_row, id, stage and, where it was kept, its split; where it was dropped, the step, the
    reason and its detail.
    """

    nodes: tuple[Node, ...]
    rows: tuple[RowLineage, ...] = ()
    ends: pl.DataFrame | None = field(default=None, compare=False)


def lineage(path: str | Path, row: str | None = None, *, file: str | None = None, line: int | None = None) -> Lineage:
    """The chain back to the raw files, and the way of rows along it, dropped or kept.

    Args:
        path: a dataset or model folder.
        row: an id, or its beginning: what became of the record that it came from.
        file: the name of a raw file: where every row made of it ended.
        line: a line of `file`, counted from 1 (the record's number where the file has no lines): its way too.

    Raises:
        OrpoError: the folder is no dataset, or nothing of the chain has that id or comes from that file.
        UsageError: `row` and `file` together, `line` without `file`, or so little of an id that many begin with it.
    """
    if (row is not None and file is not None) or (line is not None and file is None):
        raise UsageError("lineage: ask for a row, or for a file, or for a file and a line of it")
    nodes = read_chain(as_path(path), read_manifest(as_path(path)))
    if file is not None:
        return _file_lineage(nodes, path, file, line)
    if row is None:
        return Lineage(nodes)
    rows = tuple(row_lineage(nodes, row_id, origin) for row_id, origin in _find_row(nodes, row))
    if not rows:
        raise OrpoError(f"no row with id {row!r} in {path} or in any dataset it was made of")
    return Lineage(nodes, rows)


# --- rows ------------------------------------------------------------------------------------------------------------


def _find_row(nodes: Sequence[Node], row: str) -> list[tuple[str, Origin]]:
    """Ids that begin with `row` and where they come from, looked up in kept and dropped rows of every stage."""
    found: dict[tuple[str, Origin], None] = {}
    for node in nodes:
        for frame in _text_frames(node):
            hits = frame.filter(pl.col("id").str.starts_with(row)).select("id", *ORIGIN_COLUMNS).collect()
            found |= {(i, Origin(source, file, number)): None for i, source, file, number in hits.iter_rows()}
    # an id of a later stage and one of an earlier stage can lead to the same record: tell its story once
    by_origin = {origin: row_id for row_id, origin in found}
    if (ids := len(set(by_origin.values()))) > MOST_IDS:
        raise UsageError(f"row {row!r}: {ids:,} ids begin so, give more of it")
    return [(row_id, origin) for origin, row_id in by_origin.items()]


def _text_frames(node: Node) -> Iterator[pl.LazyFrame]:
    """The tables of a folder that carry origins."""
    if not node.manifest.dropped:
        return
    kept = node.kept
    if "source_row" in kept.collect_schema():
        yield kept
    yield node.dropped


def row_lineage(
    nodes: Sequence[Node], row_id: str | None, origin: Origin, told: frozenset[Origin] = frozenset()
) -> RowLineage:
    """The way of one record; `told` are those whose way is being told, so that no two rows refer to each other."""
    decisions: list[Decision] = []
    before: list[dict[str, Any]] = []
    for node in nodes:
        made = [] if not node.manifest.dropped else list(_decisions(node, origin, before))
        decisions += [decision for decision, _ in made]
        if made:  # a stage of another source makes nothing of this record
            before = [row for decision, row in made if decision.kept]
    told |= {origin}
    falls = (decision.steps[-1].detail or "" for decision in decisions if not decision.kept)
    named = dict(pair for detail in falls for pair in _named_rows(nodes, detail) if pair[0] not in told)
    related = tuple(row_lineage(nodes, other_id, other, told) for other, other_id in named.items())
    return RowLineage(row_id, origin, tuple(decisions), related)


def _named_rows(nodes: Sequence[Node], detail: str) -> Iterator[tuple[Origin, str]]:
    """The rows that a detail names by id and, since copies share one, by place."""
    for row_id in ROW_ID.findall(detail):
        found = [(origin, known_id) for known_id, origin in _find_row(nodes, row_id)]
        exact = [(o, i) for o, i in found if detail.endswith(f"row {o.row} of {o.source} {o.file})")]
        yield from exact or found[:1]


def _decisions(
    node: Node, origin: Origin, before: Sequence[dict[str, Any]]
) -> Iterator[tuple[Decision, dict[str, Any]]]:
    """What this stage made of the rows of `origin`, each with the row itself; `before` are those that it read."""
    stage, path = node.manifest.stage, node.path
    steps = [step for step in node.manifest.steps if step.source in (None, origin.source)]
    of_origin = (
        (pl.col("source") == origin.source)
        & (pl.col("source_file") == origin.file)
        & (pl.col("source_row") == origin.row)
    )
    rows = node.kept
    if "source_row" in rows.collect_schema():
        kept = rows.filter(of_origin).collect()
    else:  # token ids: a record of the same content would show as this one's second row
        kept = (
            rows.filter(pl.col("id").is_in([row["id"] for row in before])).unique("id", maintain_order=True).collect()
        )
    for row in kept.to_dicts():
        verdicts = tuple(_passed(step, before, row) for step in steps)
        yield Decision(stage, path, row["id"], True, row["split"], verdicts), row
    for fall in node.dropped.filter(of_origin).collect().to_dicts():
        row = _entered(fall)
        last = [step.step for step in steps].index(fall["step"])
        values = explain(steps[last], before, row)
        verdict = Verdict(fall["step"], False, fall["reason"], fall["detail"], values)
        verdicts = (*(_passed(step, before, row) for step in steps[:last]), verdict)
        yield Decision(stage, path, fall["id"], False, None, verdicts), row


def _passed(step: StepCounts, before: Sequence[dict[str, Any]], row: dict[str, Any]) -> Verdict:
    return Verdict(step.step, True, values=explain(step, before, row))


def _entered(fall: dict[str, Any]) -> dict[str, Any]:
    """A dropped row as it entered the step; nothing where it is a raw record, which may be no JSON."""
    row = orjson.loads(fall["row"]) if fall["id"] else {}
    assert isinstance(row, dict)
    return row


# --- files -----------------------------------------------------------------------------------------------------------


def _file_lineage(nodes: tuple[Node, ...], path: str | Path, file: str, line: int | None) -> Lineage:
    names = [item.name for node in nodes if node.manifest.stage == "ingest" for item in node.manifest.inputs]
    if not names:
        raise OrpoError(f"{path}: what it was made of is not beside it any more, so its raw files are not known")
    matching = [name for name in names if file == name or file.endswith(f"/{name}")]
    if not matching:
        raise OrpoError(f"no raw file {file!r} in the chain of {path}, there are {', '.join(sorted(set(names)))}")
    wanted = pl.col("source_file") == max(matching, key=len)
    ends = _ends(nodes, wanted if line is None else wanted & (pl.col("source_row") == line - 1))
    if line is None:
        return Lineage(nodes, ends=ends)
    if ends.is_empty():
        raise OrpoError(f"no row of {path} came from line {line} of {file!r}")
    # several sources may have a file of that name
    records = ends.unique(ORIGIN_COLUMNS, maintain_order=True).select(*ORIGIN_COLUMNS, "id").iter_rows()
    rows = tuple(row_lineage(nodes, row_id, Origin(*origin)) for *origin, row_id in records)
    return Lineage(nodes, rows, ends)


END_COLUMNS = [*ORIGIN_COLUMNS, "id", "stage", "split", "step", "reason", "detail"]


def _ends(nodes: Sequence[Node], wanted: pl.Expr) -> pl.DataFrame:
    """Where every row made of the wanted records ended: one line for each row that is kept, one for each dropped."""
    data = [node for node in nodes if node.manifest.dropped]
    none = pl.lit(None, pl.String)
    kept = origins(data).filter(wanted)
    ends = [kept.with_columns(stage=pl.lit(data[-1].manifest.stage), step=none, reason=none, detail=none)]
    for node in data:
        ends.append(node.dropped.filter(wanted).with_columns(stage=pl.lit(node.manifest.stage), split=none))
    return pl.concat(end.select(END_COLUMNS) for end in ends).sort(*ORIGIN_COLUMNS, "id").collect()
