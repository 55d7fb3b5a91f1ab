"""Output folders: complete or absent, and never in the place of what somebody else put there.

A folder comes into being by one rename. What a killed run left behind is removed by the next one.
"""

import ctypes
import json
import os
import shutil
from pathlib import Path

from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from orpo_data.shards import file_sha256, list_files


def commit_folder(folder: Path, output: Path, manifest: Manifest) -> None:
    """Make `folder`, complete but for its manifest, the dataset folder or model folder `output`."""
    known = {shard.path for shard in (*manifest.shards, *manifest.dropped)}
    files = {name: file_sha256(folder / name) for name in list_files(folder) if name not in known}
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    refuse_foreign_files(output)
    try:
        _take_place(folder, output)
    finally:
        _finish_move(output)


def _take_place(folder: Path, output: Path) -> None:
    """Rename `folder` to `output`; an older `output` is then _stale, and in no instant is there none, if the system
    can exchange two names."""
    if not output.exists():
        folder.rename(output)
        return
    folder.rename(_stale(output))
    if not _exchange(_stale(output), output):
        _stale(output).rename(folder)
        output.rename(_stale(output))
        folder.rename(output)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one instant, as Linux can on most file systems; False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2  # of fcntl.h and stdio.h
    return rename is not None and rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def _stale(output: Path) -> Path:
    """Where an older folder waits while a newer one takes its place."""
    return output.parent / f".{output.name}.stale"


def _finish_move(output: Path) -> None:
    """Put the older folder back where the newer one did not arrive, remove it where it did."""
    stale = _stale(output)
    if stale.exists() and not output.exists():
        stale.rename(output)
    remove_folder(stale)


def refuse_foreign_folder(output: Path) -> None:
    """OrpoError if `output` holds something that this project did not write: it is left untouched.

    First tidies up after a run that was killed while it moved its folder there.
    """
    _finish_move(output)
    if output.is_file():
        raise OrpoError(f"{output}: is a file, an output folder is needed")
    if output.is_dir() and any(output.iterdir()) and not _is_ours(output):
        raise OrpoError(
            f"{output}: holds something else (no {MANIFEST_NAME} of this project); choose another folder or empty it"
        )


def _is_ours(folder: Path) -> bool:
    """Whether a manifest of this project lies there, of whatever version, damaged or not."""
    try:
        document = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.keys() >= {"format_version", "stage", "fingerprint", "content_hash"}


def refuse_foreign_files(output: Path) -> None:
    """OrpoError naming a file that someone added to the folder `output`: it would be lost with the older one."""
    try:
        manifest = read_manifest(output)
    except OrpoError:
        return
    known = {*manifest.files, *(shard.path for shard in (*manifest.shards, *manifest.dropped))}
    for name in list_files(output):
        if name not in known and not Path(name).name.startswith("."):
            raise OrpoError(
                f"{output / name}: was added to this folder, which is to be written anew; move it elsewhere"
            )


def remove_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
