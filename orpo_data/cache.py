"""Files of object storage on this machine: downloaded once, checked, named by their sha256, memory-mapped from there.

Everything in the cache can be removed at any time that nothing runs.
"""

import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from orpo_data.errors import OrpoError
from orpo_data.places import OBJECT_STORES, copy, file_sha256, is_local, send, storage, storage_stamp, without_secrets

R = TypeVar("R")

TRANSFERS = 8  # at once


def cache_folder() -> Path:
    """Where downloads and converted models are kept: $ORPO_CACHE, or the user's cache folder."""
    if folder := os.environ.get("ORPO_CACHE"):
        return Path(folder)
    from platformdirs import user_cache_path

    return user_cache_path("orpo")


def cached(sha256: str) -> Path:
    """Where the file with these bytes lies, if it is in the cache."""
    return cache_folder() / "files" / sha256[:2] / sha256


def fetch(file: Path, sha256: str) -> Path:
    """A local file with these bytes: `file` itself where it is local, else its copy in the cache.

    Processes that want the same file at a time download it once. OrpoError if its bytes are others.
    """
    return file if is_local(file) else fetch_from(*storage(file), sha256)


def fetch_from(fs: Any, name: str, sha256: str) -> Path:
    """As `fetch`, of what a file system of fsspec calls `name`."""
    here = cached(sha256)
    if not here.is_file():
        here.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{here}.lock"):
            if not here.is_file():
                new = download(fs, name)
                if file_sha256(new) != sha256:
                    new.unlink()
                    raise OrpoError(f"{without_secrets(name)}: its bytes changed, its sha256 is not the one on record")
                os.replace(new, here)
    return here


def bring(fs: Any, name: str) -> Path:
    """The file as it is now, in the cache; an object store is asked first whether it changed."""
    version = _version(fs, name)
    if version and version.is_file() and (known := cached(version.read_text())).is_file():
        return known
    new = download(fs, name)
    sha256 = file_sha256(new)
    here = cached(sha256)
    here.parent.mkdir(parents=True, exist_ok=True)
    os.replace(new, here)
    if version and version == _version(fs, name):  # it was not written meanwhile
        note = scratch_file()
        note.write_text(sha256)
        version.parent.mkdir(parents=True, exist_ok=True)
        os.replace(note, version)
    return here


def _version(fs: Any, name: str) -> Path | None:
    """Where the sha256 of the file as it is now is noted, once it is known; of a web server's file nobody knows."""
    from orpo_data.network import persistently  # slow to import, and only needed here

    if OBJECT_STORES.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        return None
    stamp = persistently(Path(name).name, lambda: storage_stamp(fs, name))
    return cache_folder() / "versions" / hashlib.sha256(f"{name} {stamp}".encode()).hexdigest()


def download(fs: Any, name: str) -> Path:
    """A new local copy of a file of a storage."""
    from orpo_data import network  # slow to import, and only needed here

    new = scratch_file()
    try:
        network.download(fs, name, new)
    except BaseException:
        new.unlink()
        raise
    return new


def fetch_ahead(files: Iterable[tuple[Path, str]], ahead: int = TRANSFERS) -> Iterator[Path]:
    """`fetch` of each (file, sha256), in order, while the next ones are on their way."""
    running: deque[Future[Path]] = deque()
    with ThreadPoolExecutor(ahead) as pool:
        try:
            for file, sha256 in files:
                running.append(pool.submit(fetch, file, sha256))
                if len(running) > ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def scratch_file() -> Path:
    """A new empty file beside the cache, so that it can be moved there."""
    folder = cache_folder() / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder)
    os.close(handle)
    return Path(name)


def scratch_folder(name: str) -> Path:
    """Where work for the place `name` can be done on this machine; not created."""
    return cache_folder() / "scratch" / hashlib.sha256(name.encode()).hexdigest()[:16]


def beside(output: Path) -> Path:
    """The folder for work on `output` that is to be moved there: where it lies, or on this machine."""
    return output.parent if is_local(output) else scratch_folder(str(output))


def deliver(file: Path, to: Path, sha256: str | None = None) -> None:
    """Move a local file to `to`; from a storage's it goes on into the cache, if its sha256 is given."""
    if is_local(to):
        file.rename(to)
        return
    send(file, to)
    if sha256 is None:
        file.unlink()
        return
    here = cached(sha256)
    here.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, here)


def move_all(files: Iterable[tuple[Path, Path, str]]) -> None:
    """Give each (file, place, sha256) its place, wherever both are; those on a storage side by side."""
    side_by_side(_move, files)


def side_by_side(work: Callable[..., R], arguments: Iterable[tuple[object, ...]]) -> list[R]:
    """`work` with each of the arguments, several at a time; the results in order."""
    with ThreadPoolExecutor(TRANSFERS) as pool:
        return list(pool.map(lambda each: work(*each), arguments))


def _move(file: Path, to: Path, sha256: str) -> None:
    if is_local(file):
        deliver(file, to, sha256)
    else:
        copy(file, to)
        file.unlink()
