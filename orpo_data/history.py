"""What happened to a dataset and to a row, read back from the manifests and the shards themselves."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Manifest, read_manifest
from orpo_data.shards import DROPPED_FOLDER, scan

ORIGIN_COLUMNS = ["source", "source_file", "source_row"]


@dataclass(frozen=True)
class Origin:
    """A record of a raw file."""

    source: str
    file: str
    row: int


@dataclass(frozen=True)
class Decision:
    """What one stage made of a row: `detail` holds its figures when kept, the reason's detail when dropped."""

    stage: str
    path: Path
    id: str | None
    kept: bool
    split: str | None
    step: str | None
    reason: str | None
    detail: dict[str, Any]


@dataclass(frozen=True)
class RowLineage:
    """A row's raw origin and every decision made on it, in the order of the stages."""

    id: str
    origin: Origin
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Node:
    """One dataset or model folder of the chain; `sound` is false when it is not what the next stage read."""

    path: Path
    manifest: Manifest
    sound: bool


@dataclass(frozen=True)
class Lineage:
    """The chain from the raw files to a dataset, first stage first, and the rows asked for."""

    nodes: tuple[Node, ...]
    rows: tuple[RowLineage, ...]


def lineage(path: str | Path, row: str | None = None) -> Lineage:
    """The chain back to the raw files; with `row` (an id, or its beginning) also that row's way, dropped or kept.

    Raises OrpoError if the folder is no dataset or no row of the chain has that id.
    """
    nodes = _chain(Path(path))
    if row is None:
        return Lineage(nodes, ())
    rows = tuple(_row_lineage(nodes, row_id, origin) for row_id, origin in _find_row(nodes, row))
    if not rows:
        raise OrpoError(f"no row with id {row!r} in {path} or in any dataset it was made of")
    return Lineage(nodes, rows)


def _chain(path: Path, expected: str | None = None) -> tuple[Node, ...]:
    """Depth first through the inputs, so every folder stands behind what it was made of."""
    manifest = read_manifest(path)
    nodes: dict[Path, Node] = {}
    for item in manifest.inputs:
        if item.path is None:
            continue
        folder = path / item.path
        if (folder / MANIFEST_NAME).exists():
            nodes |= {node.path: node for node in _chain(Path(os.path.normpath(folder)), item.content_hash)}
    nodes[path] = Node(path, manifest, sound=expected in (None, manifest.content_hash))
    return tuple(nodes.values())


def _find_row(nodes: tuple[Node, ...], row: str) -> list[tuple[str, Origin]]:
    """Ids that begin with `row` and where they come from, looked up in kept and dropped rows of every stage."""
    found: dict[tuple[str, Origin], None] = {}
    for node in nodes:
        for frame in _text_frames(node):
            hits = frame.filter(pl.col("id").str.starts_with(row)).select("id", *ORIGIN_COLUMNS).collect()
            found |= {(i, Origin(source, file, number)): None for i, source, file, number in hits.iter_rows()}
    # an id of a later stage and one of an earlier stage can lead to the same record: tell its story once
    by_origin = {origin: row_id for row_id, origin in found}
    return [(row_id, origin) for origin, row_id in by_origin.items()]


def _text_frames(node: Node) -> Iterator[pl.LazyFrame]:
    """The tables of a folder that carry origins."""
    if not node.manifest.dropped:
        return
    kept = scan(node.path)
    if "source_row" in kept.collect_schema():
        yield kept
    yield scan(node.path, DROPPED_FOLDER)


def _row_lineage(nodes: tuple[Node, ...], row_id: str, origin: Origin) -> RowLineage:
    decisions: list[Decision] = []
    ids = {row_id}
    for node in nodes:
        made = list(_decisions(node, origin, ids))
        ids |= {decision.id for decision in made if decision.id}
        decisions += made
    return RowLineage(row_id, origin, tuple(decisions))


def _decisions(node: Node, origin: Origin, ids: set[str]) -> Iterator[Decision]:
    """What this stage did with the rows that came from `origin`; tokenized rows are known by their id."""
    if not node.manifest.dropped:
        return
    of_origin = (
        (pl.col("source") == origin.source)
        & (pl.col("source_file") == origin.file)
        & (pl.col("source_row") == origin.row)
    )
    splits: list[str | None] = [*node.manifest.splits]
    for split in splits or [None]:
        kept = scan(node.path, split)
        wanted = of_origin if "source_row" in kept.collect_schema() else pl.col("id").is_in(list(ids))
        for row in kept.filter(wanted).collect().to_dicts():
            yield Decision(node.manifest.stage, node.path, row["id"], True, split, None, None, _figures(row))
    for row in scan(node.path, DROPPED_FOLDER).filter(of_origin).collect().to_dicts():
        detail = {"detail": row["detail"]} if row["detail"] else {}
        yield Decision(node.manifest.stage, node.path, row["id"], False, None, row["step"], row["reason"], detail)


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a kept row that say what was decided on it, not its text."""
    ids = {side: row.get(f"{side}_input_ids") for side in ("chosen", "rejected")}
    lengths = {f"{side}_tokens": len(tokens) for side, tokens in ids.items() if tokens is not None}
    plain = {
        name: value
        for name, value in row.items()
        if name not in ("id", *ORIGIN_COLUMNS) and value is not None and not isinstance(value, list)
    }
    return plain | lengths
