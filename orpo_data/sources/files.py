"""From a recipe's `path` to raw records: find the files, bring them here, read them piece by piece."""

import atexit
import glob
import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate

from orpo_data.errors import OrpoError
from orpo_data.schema import RAW
from orpo_data.shards import file_sha256

WHOLE = (".json", ".json.gz")
ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", *WHOLE, ".parquet", ".arrow")

NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` and the hub write beside the data."""

NOT_UTF8 = "not UTF-8: "
"""Begins the record of a line that is no text, so that it can never pass for JSON."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WILDCARD = re.compile(r"[*?[]")
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawFile:
    """One file of a source."""

    name: str  # relative to the source's path, with forward slashes
    path: Path  # where it lies on this machine


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
        revision: commit, branch or tag on the hub; nothing else has one.
        pattern: glob over the names; "*" stays within a folder, "**" does not.
        exclude: globs of names to leave out, whatever asked for them.
        endings: of file names that hold data.

    Raises:
        OrpoError: nothing there, nothing that matches, an unknown kind of file, or a failed download.
    """
    if "://" in path:
        files = _remote_files(path, endings)
    elif (local := _local_files(path, endings)) is not None:
        files = local
    elif HUB_ID.fullmatch(path) and not _ending(path, endings):
        files = _hub_files(path, revision, pattern, exclude, endings)
    else:
        raise OrpoError(f"{path}: no such file or folder; a path is a file, folder, glob, URL or hub id")
    wanted = [file for file in files if pattern is None or _matches(file.name, pattern)]
    kept = [file for file in wanted if not any(_matches(file.name, name) for name in exclude)]
    if not kept:
        raise OrpoError(_nothing_to_read(path, pattern, files, wanted, endings))
    return sorted(kept, key=lambda file: file.name)


def _nothing_to_read(
    path: str, pattern: str | None, files: list[RawFile], wanted: list[RawFile], endings: tuple[str, ...]
) -> str:
    if wanted:
        return f"{path}: {wanted[0].name} is left out for this dataset, and there is no other file"
    if files:
        return f"{path}: no file matches files={pattern!r}, there is for example {files[0].name}"
    return f"{path}: no data files, looked for {' '.join(endings)}"


def _local_files(path: str, endings: tuple[str, ...]) -> list[RawFile] | None:
    """None when there is nothing at `path`. Links keep their own names: the hub's cache is made of them."""
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
    return [file for file in files if _is_data(file.name, endings)]


def _remote_files(url: str, endings: tuple[str, ...]) -> list[RawFile]:
    """Copies in a temporary folder that goes with this process."""
    try:
        fs, root = url_to_fs(url)
        single = root.partition("?")[0]  # a web address may end with a query, so "?" is no wildcard here
        if WILDCARD.search(single):
            base, found = _fixed_part(root), fs.glob(root)
        elif not _ending(single, endings) and fs.isdir(root):
            base, found = root, fs.find(root)
        else:
            if not fs.exists(root):
                raise FileNotFoundError("no such file or folder")
            _require_ending(single, endings)
            base, found = single.rpartition("/")[0], [root]
        names = [file.removeprefix(base).lstrip("/").partition("?")[0] for file in found]
        remote = [(name, file) for name, file in zip(names, found, strict=True) if _is_data(name, endings)]
        folder = Path(tempfile.mkdtemp(prefix="orpo-source-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        files = [RawFile(name, folder / str(i)) for i, (name, _) in enumerate(remote)]  # others' names make no paths
        for copy, (_, file) in zip(files, remote, strict=True):
            fs.get_file(file, str(copy.path))
    except (OSError, ValueError, ImportError) as error:
        raise OrpoError(f"{url}: cannot be read: {_reason(error)}") from error
    return files


def _hub_files(
    repo: str, revision: str | None, pattern: str | None, exclude: tuple[str, ...], endings: tuple[str, ...]
) -> list[RawFile]:
    import huggingface_hub  # slow to import, and only needed here
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # that of the HTTP client it uses

    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            repo_type="dataset",
            revision=revision,
            allow_patterns=_hub_patterns([pattern] if pattern else [f"*{ending}" for ending in endings]),
            ignore_patterns=_hub_patterns(exclude),
        )
    except (OSError, ValueError, HTTPError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise OrpoError(f"{repo}{at}: nothing here by that name, and not from the hub: {_reason(error)}") from error
    return _local_files(str(folder), endings) or []


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
    *folders, base = name.split("/")
    hidden = base.startswith(("_", ".")) or any(folder.startswith(".") for folder in folders)
    return _ending(base, endings) is not None and base not in NOT_DATA and not hidden


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


# --- reading ---------------------------------------------------------------------------------------------------------


def file_digest(file: RawFile) -> str:
    """sha256 of the file as it lies there."""
    return file_sha256(file.path)


def read_records(file: RawFile, source: str, batch_rows: int = 1000) -> Iterator[pa.Table]:
    """The records of `file` as RAW tables of at most `batch_rows` rows, in order.

    Every line of JSON lines is passed on as it is, broken or not; blank ones are skipped but counted. Only a `.json`
    array is read in one piece.

    Raises:
        OrpoError: the file as a whole is broken: cut short, or not of the kind its name says.
    """
    try:
        records = _records(file)
        while batch := list(islice(records, batch_rows)):
            yield pa.table(
                {
                    "source": pa.repeat(source, len(batch)),
                    "source_file": pa.repeat(file.name, len(batch)),
                    "source_row": pa.array([row for row, _ in batch], pa.int32()),
                    "record": pa.array([record for _, record in batch], pa.string()),
                },
                schema=RAW,
            )
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, pa.ArrowException) as error:
        raise OrpoError(f"{file.name}: the file is broken: {_reason(error)}; get it again") from error


def _records(file: RawFile) -> Iterator[tuple[int, str]]:
    """(row, JSON text) of every record."""
    ending = _ending(file.name)
    if ending == ".parquet":
        return enumerate(_dumped(pq.ParquetFile(file.path).iter_batches()))
    if ending == ".arrow":
        return enumerate(_dumped(_arrow_batches(file.path)))
    return _json_records(file, whole=ending in WHOLE)


def _dumped(batches: Iterable[pa.RecordBatch]) -> Iterator[str]:
    """Each row as JSON; what JSON has no form for (bytes, decimals) as its text."""
    for batch in batches:
        for row in batch.to_pylist():
            yield orjson.dumps(row, default=str).decode()


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as data:
        if data.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(data)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            data.seek(0)
            yield from pa.ipc.open_stream(data)
            if data.read_at(8, data.size() - 8) != STREAM_END:
                raise EOFError("no end of stream: the file was cut short")


def _json_records(file: RawFile, whole: bool) -> Iterator[tuple[int, str]]:
    with _open(file) as data:
        lines = enumerate(data)
        head = next(((row, line.removeprefix(BOM)) for row, line in lines if line.removeprefix(BOM).strip()), None)
        if head is None:
            return
        if whole and head[1].lstrip().startswith(b"["):
            yield from enumerate(_array(b"".join([head[1], *(line for _, line in lines)])))
            return
        if whole:
            orjson.loads(head[1])  # neither an array nor JSON lines: an object over several lines, for example
        for row, line in chain([head], lines):
            if stripped := line.strip():
                yield row, _decoded(stripped)


def _open(file: RawFile) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(file.path) if file.name.lower().endswith(".gz") else file.path.open("rb")


def _array(content: bytes) -> Iterator[str]:
    """The elements of a JSON array. The standard reader lets pass what JSON forbids (NaN, half a surrogate pair) and
    writes it out again as it was, so that it costs its row and not the file."""
    values: list[Any] = json.loads(content)
    for value in values:
        yield json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return NOT_UTF8 + line.decode(errors="backslashreplace")
