"""The chain of folders from the raw files to a dataset, and the rows in each."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from orpo_data.manifest import MANIFEST_NAME, Manifest, Shard, read_manifest
from orpo_data.shards import open_shard

ORIGIN_COLUMNS = ["source", "source_file", "source_row"]


@dataclass(frozen=True)
class Node:
    """One dataset or model folder of the chain; `sound` is false when it is not what the next stage read."""

    path: Path
    manifest: Manifest
    sound: bool

    @cached_property
    def kept(self) -> pl.LazyFrame:
        """The rows of a dataset in order, over the same bytes, with the column `split`."""
        return pl.concat(
            self._rows(shard).with_columns(split=pl.lit(shard.split, pl.String)) for shard in self.manifest.shards
        )

    @cached_property
    def dropped(self) -> pl.LazyFrame:
        return pl.concat(self._rows(shard) for shard in self.manifest.dropped)

    def _rows(self, shard: Shard) -> pl.LazyFrame:
        frame = pl.from_arrow(open_shard(self.path / shard.path), rechunk=False)
        assert isinstance(frame, pl.DataFrame)
        return frame.lazy()


def chain_to(
    path: Path, manifest: Manifest, expected: str | None = None, *, sound_only: bool = False
) -> tuple[Node, ...]:
    """Depth first through the inputs, so every folder stands behind what it was made of.

    `sound_only` leaves out a folder that is not what the next stage read, and with it all that it was made of.
    """
    nodes: dict[Path, Node] = {}
    for item in manifest.inputs:
        folder = Path(os.path.normpath(path / (item.path or "")))
        if item.path is None or not (folder / MANIFEST_NAME).exists():
            continue
        source = read_manifest(folder)
        if not sound_only or source.content_hash == item.content_hash:
            nodes |= {node.path: node for node in chain_to(folder, source, item.content_hash, sound_only=sound_only)}
    nodes[path] = Node(path, manifest, sound=expected in (None, manifest.content_hash))
    return tuple(nodes.values())


def origins(data: Sequence[Node]) -> pl.LazyFrame:
    """Origin, id and split of every row of the last of `data`; token ids get theirs from the dataset before."""
    *before, last = data
    rows = last.kept
    if "source_row" in rows.collect_schema():
        return rows.select(*ORIGIN_COLUMNS, "id", "split")
    return origins(before).join(rows.select("id"), on="id", how="semi")
