"""Output folders: complete or absent, and never in the place of what somebody else put there.

On this machine a folder comes into being by one rename. On a storage, which has none, it is made whole beside its place
and copied there by the storage itself: the older manifest goes first, the new one comes last, and in between nothing
opens as a dataset. What a killed run left behind is finished or removed by the next one.
"""

import ctypes
import json
import os
from pathlib import Path

import orjson

from orpo_data.cache import move_all, side_by_side
from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from orpo_data.places import copy, file_sha256, is_local, remove_folder, storage, storage_stamp
from orpo_data.shards import list_files

STAMPS_NAME = "_storage.json"
"""What the storage says of each file, its size and its own checksum: as long as it says so, the file is unchanged."""


def partial_folder(output: Path) -> Path:
    """Where a folder is made before it takes its place."""
    return output.parent / f".{output.name}.partial"


def commit_folder(folder: Path, output: Path, manifest: Manifest) -> None:
    """Make `folder`, complete but for its manifest, the dataset folder or model folder `output`."""
    known = {shard.path for shard in (*manifest.shards, *manifest.dropped)}
    files = {name: file_sha256(folder / name) for name in list_files(folder) if name not in known}
    refuse_foreign_files(output)
    if not is_local(output):
        _replace(folder, output, manifest.model_copy(update={"files": files}))
        return
    write_manifest(folder, manifest.model_copy(update={"files": files}))
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


def _replace(folder: Path, output: Path, manifest: Manifest) -> None:
    """As a rename, on a storage: once the folder beside `output` has its manifest, it will take that place."""
    partial = partial_folder(output)
    if is_local(folder):
        sha256 = manifest.files | {shard.path: shard.sha256 for shard in (*manifest.shards, *manifest.dropped)}
        move_all((folder / name, partial / name, sha256[name]) for name in list_files(folder))
        remove_folder(folder)
    write_manifest(partial, manifest)
    _finish_replacing(output)


def _finish_replacing(output: Path) -> None:
    """Where a complete folder lies beside `output`, put it there; what else lies there is of no use."""
    partial = partial_folder(output)
    if not (partial / MANIFEST_NAME).exists():
        remove_folder(partial)
        return
    manifest = read_manifest(partial)
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    names = list_files(partial)
    for name in {*list_files(output)} - {*names}:
        (output / name).unlink()
    side_by_side(copy, [(partial / name, output / name) for name in names])
    stamps = dict(zip(names, side_by_side(storage_stamp, [storage(output / name) for name in names]), strict=True))
    (output / STAMPS_NAME).write_bytes(orjson.dumps(stamps, option=orjson.OPT_INDENT_2) + b"\n")
    files = manifest.files | {STAMPS_NAME: file_sha256(output / STAMPS_NAME)}
    write_manifest(output, manifest.model_copy(update={"files": files}))
    (partial / MANIFEST_NAME).unlink()  # before the rest: half a folder is not to take this place again
    remove_folder(partial)


def _finish_move(output: Path) -> None:
    """Put the older folder back where the newer one did not arrive, remove it where it did."""
    if not is_local(output):
        _finish_replacing(output)
        return
    stale = _stale(output)
    if stale.exists() and not stale.is_symlink() and not output.exists():
        stale.rename(output)
    remove_folder(stale)


def refuse_foreign_folder(output: Path) -> None:
    """OrpoError if `output` holds something that this project did not write: it is left untouched.

    First tidies up after a run that was killed while it moved its folder there.
    """
    _finish_move(output)
    if is_local(output) and (output.is_symlink() or output.is_mount()):  # the new folder would take the name
        raise OrpoError(f"{output}: is a link or a mount point, whose place no folder can take; name one inside of it")
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
