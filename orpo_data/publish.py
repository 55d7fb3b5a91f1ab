"""Puts a dataset where others find it: a hub repository, a bucket or server that fsspec knows, or another folder.

What arrives is a dataset folder again: the same shards, card and report, parquet files and their Croissant metadata
beside them, and a manifest over all of it, so that whoever fetches it can verify it.
"""

import tempfile
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import orjson
import polars as pl

from orpo_data.croissant import CROISSANT_NAME, croissant
from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from orpo_data.pages.upstream import sources_of
from orpo_data.parquet import write_parquet
from orpo_data.places import as_path, file_sha256, is_local, without_secrets
from orpo_data.shards import fetch_folder, scan
from orpo_data.targets import FolderTarget, Target, find_target
from orpo_data.verification import verify


@dataclass(frozen=True)
class PushReport:
    """What went where: `files` are bytes by path below `target`, in the order in which they were sent."""

    target: str
    files: dict[str, int]
    removed: list[str]  # files of an earlier push that are no part of this one


def push(dataset: str | Path, to: str, *, public: bool = False, published: date | None = None) -> PushReport:
    """Upload a sound dataset folder to `to`.

    `to` is a hub id (`name/dataset`), a URL that fsspec knows, or a folder (`./there`, `/there`). A hub repository is
    created if there is none, private unless `public`. `published` is the date in the metadata, by default today's.
    Raises OrpoError if the dataset is damaged or the target holds something else, UsageError if `to` is none of these.
    """
    target = find_target(to, public=public)
    place = as_path(dataset)
    if _within(target, place):
        raise OrpoError(f"{to}: is the dataset itself or lies inside it; choose another place")
    folder = fetch_folder(place)
    manifest = _sound_manifest(folder)
    with tempfile.TemporaryDirectory() as scratch:
        exported = _export(folder, manifest, target, published or datetime.now(UTC).date(), Path(scratch))
        pushed = manifest.model_copy(
            update={
                "files": manifest.files | {name: file_sha256(file) for name, file in exported.items()},
                "recipe": without_secrets(manifest.recipe),
                "steps": [
                    step.model_copy(update=without_secrets({"config": step.config, "facts": step.facts}))
                    for step in manifest.steps
                ],
            }
        )
        write_manifest(Path(scratch), pushed)
        shards = [shard.path for shard in (*manifest.shards, *manifest.dropped)]
        files = {name: folder / name for name in (*shards, *manifest.files)} | exported
        files[MANIFEST_NAME] = Path(scratch) / MANIFEST_NAME  # last, for a target without commits
        removed = target.put(files, pushed)
        return PushReport(target.url, {name: file.stat().st_size for name, file in files.items()}, removed)


def _within(target: Target, place: Path) -> bool:
    if isinstance(target, FolderTarget):
        return is_local(place) and target.folder.resolve().is_relative_to(place.resolve())
    return f"{target.url}/".startswith(f"{place}/")


def _sound_manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if not manifest.shards or not manifest.shards[0].path.endswith(".arrow"):
        raise OrpoError(f"{folder}: is the output of {manifest.stage}; only the output of a data stage can be pushed")
    report = verify(folder)
    if not report.ok:
        more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
        raise OrpoError(f"not pushed, the dataset is damaged: {report.problems[0]}{more}")
    return manifest


def _export(folder: Path, manifest: Manifest, target: Target, published: date, scratch: Path) -> dict[str, Path]:
    """Parquet files and croissant.json, made in `scratch`: each file by its path in the dataset."""
    files = write_parquet(folder, manifest, scratch)
    labels = scan(folder).select(pl.col("source").unique()).collect()["source"].to_list()
    metadata = croissant(manifest, files, sources_of(manifest, labels), target.url, published)
    (scratch / CROISSANT_NAME).write_bytes(orjson.dumps(metadata, option=orjson.OPT_INDENT_2) + b"\n")
    return {name: scratch / name for name in (*(file.path for file in files), CROISSANT_NAME)}
