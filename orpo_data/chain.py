"""The chain of folders from the raw files to a dataset or a model, and the rows in each."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import polars as pl

from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Input, Manifest, Shard, StepCounts, read_manifest
from orpo_data.places import is_local, join
from orpo_data.schema import ORIGIN_COLUMNS
from orpo_data.shards import read_shard


@dataclass(frozen=True)
class Node:
    """One dataset or model folder of a chain."""

    path: Path
    manifest: Manifest
    sound: bool = True  # whether it is still what the next stage read
    link: str = ""  # its folder as seen from the last one's, "" for the last one itself

    @property
    def branches(self) -> list[tuple[str | None, list[StepCounts]]]:
        """The steps of each source's branch, in the order they were run."""
        return [(source, list(steps)) for source, steps in groupby(self.manifest.steps, key=lambda step: step.source)]

    @property
    def label(self) -> str:
        return label(self.manifest)

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
        frame = pl.from_arrow(read_shard(self.path, shard), rechunk=False)
        assert isinstance(frame, pl.DataFrame)
        return frame.lazy()


def read_chain(folder: Path, manifest: Manifest) -> tuple[Node, ...]:
    """Every folder that `manifest`, of `folder`, was made of, each behind its inputs, and `folder` at the end.

    Those that lie no more where they were read are left out, with all that they were made of; those that are not
    what was read any more are not `sound`. Raises OrpoError where a manifest on the way is damaged.
    """
    return _in_order(_walk(Node(folder, manifest)))


def read_sound_chain(folder: Path, manifest: Manifest) -> tuple[Node, ...]:
    """As `read_chain`, but only what the rows of `folder` were made of beyond doubt.

    Where one input is missing, damaged or not what was read, the chain begins with the dataset that read it.
    """
    return _in_order(_sound_walk(Node(folder, manifest)))


def _walk(node: Node) -> Iterator[Node]:
    for item in node.manifest.inputs:
        if (earlier := _input(node, item)) is not None:
            yield from _walk(earlier)
    yield node


def _sound_walk(node: Node) -> Iterator[Node]:
    try:
        inputs = [_input(node, item) for item in node.manifest.inputs]
    except OrpoError:
        inputs = [None]
    known = [earlier for earlier in inputs if earlier is not None and earlier.sound]
    for earlier in known if len(known) == len(inputs) else []:
        yield from _sound_walk(earlier)
    yield node


def _input(node: Node, item: Input) -> Node | None:
    """The folder that a stage read, if there is one still."""
    if item.path is None:
        return None
    folder = _without_dots(join(node.path, item.path))
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(folder)
    link = item.path if "://" in item.path else os.path.normpath(os.path.join(node.link, item.path))
    return Node(folder, manifest, manifest.content_hash == item.content_hash, link)


def _without_dots(folder: Path) -> Path:
    """The same folder without `..`; where a link lies on the way, `x/..` is another folder, and they stay."""
    if not is_local(folder):
        return folder
    short = Path(os.path.normpath(folder))
    return short if short.exists() and folder.exists() and short.samefile(folder) else folder


def _in_order(walked: Iterator[Node]) -> tuple[Node, ...]:
    """Each folder once, where it is met first; it is sound if it is what all its readers read."""
    nodes: dict[str, Node] = {}
    for node in walked:
        if node.link not in nodes or not node.sound:
            nodes[node.link] = node
    return tuple(nodes.values())


def label(manifest: Manifest) -> str:
    """The stage, and of an ingest its source: there is one for each."""
    sources = {step.source for step in manifest.steps} if manifest.stage == "ingest" else set()
    return " · ".join([manifest.stage, *filter(None, sources)])


def title(manifest: Manifest) -> str:
    """How a dataset is called on its pages."""
    return f"{manifest.recipe.get('name', 'dataset')}: {label(manifest)}"


def raw_rows(chain: Sequence[Node]) -> int:
    """Rows that came in where the chain begins: records of raw files, if it goes back that far."""
    first = chain[0].manifest.stage
    begins = [node for node in chain if node.manifest.stage == first]
    return sum(node.manifest.rows_in for node in begins)


NO_LINES = (".parquet", ".arrow", ".json", ".json.gz")
"""Files whose records are numbered; those of any other kind are lines."""


def record_name(file: str, row: int) -> str:
    """The record that a row came from as people count: "line 1" is row 0 of a file of JSON lines."""
    return f"{'record' if file.lower().endswith(NO_LINES) else 'line'} {row + 1}"


def origins(data: Sequence[Node]) -> pl.LazyFrame:
    """Origin, id and split of every row of the last of `data`; token ids get theirs from the dataset before."""
    *before, last = data
    rows = last.kept
    if "source_row" in rows.collect_schema():
        return rows.select(*ORIGIN_COLUMNS, "id", "split")
    return origins(before).join(rows.select("id"), on="id", how="semi")
