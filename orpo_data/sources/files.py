"""From a recipe's `path` to raw records: find the files, bring them here, read them piece by piece."""

import glob
import logging
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate

from orpo_data.batches import regrouped
from orpo_data.cache import bring, fetch_from, side_by_side
from orpo_data.errors import OrpoError
from orpo_data.places import client_options, file_sha256, redacted, without_secrets
from orpo_data.schema import RAW
from orpo_data.sources.json_text import LIMITS, CompressionError, Limits, json_records
from orpo_data.sources.tables import table_records

WHOLE = (".json", ".json.gz")
TABLES = (".parquet", ".arrow")
ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", *WHOLE, *TABLES)

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` and the hub write beside the data."""

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WILDCARD = re.compile(r"[*?[]")


@dataclass(frozen=True)
class RawFile:
    """One file of a source."""

    name: str  # relative to the source's path, with forward slashes
    path: Path  # where it lies on the machine that found it
    remote: tuple[Any, str] | None = field(default=None, compare=False, repr=False)
    """Where any machine gets it, if it was not here from the beginning: a file system of fsspec and a name there."""
    revision: str | None = None  # on the hub; nothing else has one

    def here(self, sha256: str) -> "RawFile":
        """The same file on this machine, which may be another one; OrpoError if it is not what was found."""
        if self.remote and not self.path.exists():
            return replace(self, path=fetch_from(*self.remote, sha256))
        if not self.path.exists():
            raise OrpoError(f"{self.path}: is not on {socket.gethostname()}; put it where all workers see it")
        if file_digest(self) != sha256:
            raise OrpoError(f"{self.path}: is not the same file on {socket.gethostname()}, or was changed meanwhile")
        return self


# --- finding ---------------------------------------------------------------------------------------------------------


def find_files(
    path: str,
    revision: str | None = None,
    pattern: str | None = None,
    exclude: tuple[str, ...] = (),
    endings: tuple[str, ...] = ENDINGS,
) -> list[RawFile]:
    """The data files of a source, sorted by name; files that are not here are downloaded.

    Args:
        path: a local file, folder or glob, an fsspec URL of any of these, or a dataset's id on the Hugging Face hub.
        revision: commit, branch or tag on the hub; not asked for elsewhere.
        pattern: glob over the names; "*" stays within a folder, "**" does not.
        exclude: globs of names to leave out, whatever asked for them.
        endings: of file names that hold data.

    Raises:
        OrpoError: nothing there, nothing that matches, an unknown kind of file, or a failed download.
    """
    choose = partial(_choose, without_secrets(path), pattern, exclude, endings)
    if "://" in path:
        return _remote_files(path, endings, choose)
    if (local := _local_files(path, endings)) is not None:
        files = local
    elif HUB_ID.fullmatch(path) and not _ending(path, endings):
        files = _hub_files(path, revision, pattern, exclude, endings)
    else:
        raise OrpoError(f"{path}: no such file or folder; a path is a file, folder, glob, URL or hub id")
    by_name = {file.name: file for file in files}
    return [by_name[name] for name in choose(by_name)]


def _choose(
    path: str, pattern: str | None, exclude: tuple[str, ...], endings: tuple[str, ...], names: Iterable[str]
) -> list[str]:
    """The names to read, sorted; OrpoError if there is none."""
    found = list(names)
    wanted = [name for name in found if pattern is None or _matches(name, pattern)]
    kept = [name for name in wanted if not any(_matches(name, left_out) for left_out in exclude)]
    if not kept:
        raise OrpoError(_nothing_to_read(path, pattern, found, wanted, endings))
    return sorted(kept)


def _nothing_to_read(
    path: str, pattern: str | None, found: list[str], wanted: list[str], endings: tuple[str, ...]
) -> str:
    if wanted:
        return f"{path}: {wanted[0]} is left out for this dataset, and there is no other file"
    if found:
        return f"{path}: no file matches files={pattern!r}, there is for example {found[0]}"
    return f"{path}: no data files, looked for {' '.join(endings)}"


def _local_files(path: str, endings: tuple[str, ...], within: Path | None = None) -> list[RawFile] | None:
    """None when there is nothing at `path`. Links keep their own names, and lead nowhere but `within` the folder."""
    here = Path(path).expanduser()
    if here.is_file():
        _require_ending(path, endings)
        return [RawFile(here.name, here)]
    if here.is_dir():
        root, found = here, list(here.rglob("*"))
    elif WILDCARD.search(path):
        root = Path(_fixed_part(here.as_posix()))
        found = [Path(match) for match in glob.glob(str(here), recursive=True)]
    else:
        return None
    files = [RawFile(file.relative_to(root).as_posix(), file) for file in found if file.is_file()]
    data = [file for file in files if _is_data(file.name, endings)]
    linked = [RawFile(path.relative_to(root).as_posix(), path) for path in found if path.is_symlink() and path.is_dir()]
    for file in (*data, *(folder for folder in linked if not _is_hidden(folder.name))):  # which nobody has entered
        _refuse_link_out(file, within or root)
    for file in files:
        if file.path.suffix in COMPRESSED and _is_data(file.path.stem, endings) and file not in data:
            log.warning("%s: passed over, the endings that are read are %s", file.path, " ".join(endings))
    return data


def _refuse_link_out(file: RawFile, root: Path) -> None:
    """OrpoError for what is a link out of the folder it was found in: a folder may come from anywhere."""
    if not (place := file.path.resolve()).is_relative_to(root.resolve()):
        raise OrpoError(
            f"{file.path}: is a link out of its folder, to {place}; name that place itself, or copy the file"
        )


def _remote_files(url: str, endings: tuple[str, ...], choose: Callable[[Iterable[str]], list[str]]) -> list[RawFile]:
    """Copies in the cache of the files that `choose` takes; the names that files have elsewhere make no paths."""
    from orpo_data.network import network_errors, persistently  # slow to import, and only needed here

    shown = without_secrets(url)
    try:
        fs, root = url_to_fs(url, **client_options(urlsplit(url).scheme))
        base, found = persistently(shown, lambda: _find_remote(fs, root, endings))
        names = [file.removeprefix(base).lstrip("/").partition("?")[0] for file in found]
        remote = {name: file for name, file in zip(names, found, strict=True) if _is_data(name, endings)}
        chosen = choose(remote)
        copies = side_by_side(bring, [(fs, remote[name]) for name in chosen])
    except network_errors(OSError, ValueError, ImportError) as error:
        raise OrpoError(f"{shown}: cannot be read: {redacted(_reason(error), url)}") from None
    return [RawFile(name, copy, (fs, remote[name])) for name, copy in zip(chosen, copies, strict=True)]


def _find_remote(fs: Any, root: str, endings: tuple[str, ...]) -> tuple[str, list[str]]:
    """The folder that names are relative to, and every file that may be one of data."""
    single = root.partition("?")[0]  # a web address may end with a query, so "?" is no wildcard here
    if WILDCARD.search(single):
        return _fixed_part(root), fs.glob(root)
    kind = fs.info(root)["type"]  # unlike exists and isdir it tells a fault from an absence
    if not _ending(single, endings) and (kind == "directory" or fs.isdir(root)):
        return root, fs.find(root)
    _require_ending(without_secrets(single), endings)
    return single.rpartition("/")[0], [root]


def _hub_files(
    repo: str, revision: str | None, pattern: str | None, exclude: tuple[str, ...], endings: tuple[str, ...]
) -> list[RawFile]:
    import huggingface_hub  # slow to import, and only needed here

    from orpo_data.hub import HUB_ERRORS, reason

    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            repo_type="dataset",
            revision=revision,
            allow_patterns=_hub_patterns([pattern] if pattern else [f"*{ending}" for ending in endings]),
            ignore_patterns=_hub_patterns(exclude),
        )
    except HUB_ERRORS as error:
        at = f" at revision {revision!r}" if revision else ""
        raise OrpoError(f"{repo}{at}: nothing here by that name, and not from the hub: {reason(error)}") from error
    hub, commit = huggingface_hub.HfFileSystem(), Path(folder).name  # a snapshot's folder is called after its commit
    blobs = Path(folder).parent.parent  # the hub's cache is made of links into the folder above
    return [
        replace(file, remote=(hub, f"datasets/{repo}@{commit}/{file.name}"), revision=revision)
        for file in _local_files(str(folder), endings, within=blobs) or []
    ]


def _hub_patterns(patterns: Iterable[str]) -> list[str]:
    """The hub's "*" also crosses folders, but its "**/" wants one: ask for both and let `find_files` choose."""
    return [form for pattern in patterns for form in dict.fromkeys((pattern, pattern.replace("**/", "")))]


def _matches(name: str, pattern: str) -> bool:
    return re.match(glob_translate(pattern), name) is not None


def _fixed_part(pattern: str) -> str:
    """The folder above the first wildcard, with its slash."""
    fixed = WILDCARD.split(pattern)[0]
    return fixed[: fixed.rfind("/") + 1]


def _ending(name: str, endings: tuple[str, ...] = ENDINGS) -> str | None:
    """Which of the endings `name` has."""
    return next((ending for ending in endings if name.lower().endswith(ending)), None)


def _require_ending(path: str, endings: tuple[str, ...]) -> None:
    if not _ending(path, endings):
        raise OrpoError(f"{path}: unknown kind of file, a data file ends with one of {' '.join(endings)}")


def _is_data(name: str, endings: tuple[str, ...]) -> bool:
    base = name.rpartition("/")[2]
    return _ending(base, endings) is not None and base not in NOT_DATA and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    *folders, base = name.split("/")
    return base.startswith(("_", ".")) or any(folder.startswith(".") for folder in folders)


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


# --- reading ---------------------------------------------------------------------------------------------------------


_DIGESTS: dict[tuple[int, ...], str] = {}
"""Of files that were read in this process, by what changes when they do."""


def file_digest(file: RawFile) -> str:
    """sha256 of the file as it lies there; read once in this process as long as it stays as it is."""
    status = file.path.stat()
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if state not in _DIGESTS:
        _DIGESTS[state] = file_sha256(file.path)
    return _DIGESTS[state]


def read_records(file: RawFile, source: str, batch_rows: int = 1000, limits: Limits = LIMITS) -> Iterator[pa.Table]:
    """The records of `file` as RAW tables of at most `batch_rows` rows, in order.

    Every line of JSON lines is passed on as it is, broken or not; blank ones are skipped but counted. Only a `.json`
    array is read in one piece.

    Raises:
        OrpoError: the file as a whole is broken: cut short, or not of the kind its name says.
    """
    try:
        for rows in regrouped(_records(file, limits), batch_rows):
            yield pa.table(
                {
                    "source": pa.repeat(source, len(rows)),
                    "source_file": pa.repeat(file.name, len(rows)),
                    **{name: rows[name] for name in ("source_row", "record")},
                },
                schema=RAW,
            )
    except (OSError, EOFError, ValueError, RecursionError, CompressionError, pa.ArrowException) as error:
        raise OrpoError(f"{file.name}: the file is broken: {_reason(error)}; get it again") from error


def _records(file: RawFile, limits: Limits) -> Iterator[pa.Table]:
    """`source_row` and `record` (JSON text) of every record, some at a time."""
    ending = _ending(file.name)
    if ending in TABLES:
        return table_records(file.path, ending == ".parquet", limits)
    return json_records(file.path, compressed=file.name.lower().endswith(".gz"), whole=ending in WHOLE, limits=limits)
