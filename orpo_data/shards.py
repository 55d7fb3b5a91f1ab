"""Dataset folders, opened: without a copy, the manifest checked.

A folder holds uncompressed Arrow IPC *stream* files of a fixed 1,000 rows a record batch, exactly what
`datasets.load_from_disk` memory-maps.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
from filelock import FileLock

from orpo_data.batches import batches_of
from orpo_data.cache import cache_folder, download, fetch, fetch_ahead, scratch_folder
from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Manifest, Shard, digest, manifest_text, read_manifest, write_manifest
from orpo_data.mapped import map_stream
from orpo_data.places import (
    as_path,
    copy,
    file_names,
    file_sha256,
    is_local,
    make_folder,
    remote_sizes,
    remove_folder,
    storage,
)

if TYPE_CHECKING:
    import datasets
    import polars as pl

DROPPED_FOLDER = "dropped"
T = TypeVar("T")
DATASETS_CACHE = re.compile(r"cache-\w+\.arrow")


def list_files(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, as sorted relative posix paths.

    The caches that `datasets` puts beside a memory-mapped dataset (`map`, `filter`) are nobody's: they are passed over.
    """
    ours = (name for name in file_names(folder) if not DATASETS_CACHE.fullmatch(name.rpartition("/")[2]))
    return sorted(name for name in ours if name != MANIFEST_NAME)


def open_shard(path: Path, sha256: str | None = None) -> pa.Table:
    """One shard, memory-mapped; OrpoError if it cannot be read.

    From a storage it is downloaded: into the cache if its `sha256` is known, else for as long as the table lives.
    """
    here = path if is_local(path) else fetch(path, sha256) if sha256 else download(*storage(path))
    try:
        return map_stream(here)
    except (OSError, ValueError) as error:
        raise OrpoError(f"{path}: unreadable shard ({error})") from None
    finally:
        if here is not path and not sha256:
            here.unlink()  # its pages stay as long as they are mapped


def read_shard(folder: Path, shard: Shard) -> pa.Table:
    """One shard of a dataset folder, memory-mapped, its bytes compared with the manifest; OrpoError if they differ."""
    [table] = opened_shards(folder, [shard], open_shard)
    return table


_SOUND: set[tuple[int | str, ...]] = set()
"""Files whose bytes this process wrote or compared: which they are, when they changed, and what they hash to."""


def opened_shards(folder: Path, shards: Sequence[Shard], opens: Callable[[Path], T]) -> Iterator[T]:
    """What `opens` makes of the file of each shard, in order; of a storage's, while the next ones are on their way.

    OrpoError if a file is missing or not what the manifest says.
    """
    wanted = [(folder / shard.path, shard.sha256) for shard in shards]
    files = (file for file, _ in wanted) if is_local(folder) else fetch_ahead(wanted)  # threads take a millisecond
    for shard, file in zip(shards, files, strict=True):
        _check_bytes(file, folder, shard)
        opened = opens(file)
        _check_bytes(file, folder, shard)  # it may be another folder by now, and then another file was opened
        yield opened


def _check_bytes(file: Path, folder: Path, shard: Shard) -> None:
    """Read every byte of a shard's file on this machine, once in this process as long as it stays as it is."""
    _check_size(file, shard, _size(file))
    state = _state(file, shard.sha256)  # before it is read: what changes meanwhile is another state
    if state in _SOUND:
        return
    if file_sha256(file) != shard.sha256:
        remedy = f"remove {folder} and make it again" if is_local(folder) else "remove this download of it"
        raise OrpoError(
            f"{file}: its bytes changed since it was written (sha256 differs from the manifest); "
            f"`orpo verify {folder}` tells more; {remedy}"
        )
    _SOUND.add(state)


def is_sound(file: Path, sha256: str) -> bool:
    """Whether this process knows, from writing or from reading it, that a file hashes to that."""
    return _state(file, sha256) in _SOUND


def mark_sound(file: Path, sha256: str) -> None:
    """Remember what the bytes of a file hash to, until it changes."""
    _SOUND.add(_state(file, sha256))


def _state(file: Path, sha256: str) -> tuple[int | str, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256


def fetch_folder(folder: Path) -> Path:
    """The whole of a dataset or model folder on this machine: itself, or where its downloads lie under its names."""
    if is_local(folder):
        return folder
    manifest = read_manifest(folder)
    files = manifest.files | {shard.path: shard.sha256 for shard in (*manifest.shards, *manifest.dropped)}
    here = cache_folder() / "folders" / digest(manifest_text(manifest))
    make_folder(here.parent)
    with FileLock(f"{here}.lock"):  # processes that want the same folder at a time fetch it once
        if not here.exists():
            made = scratch_folder(str(here))
            remove_folder(made)
            for name, file in zip(files, fetch_ahead((folder / name, files[name]) for name in files), strict=True):
                make_folder((made / name).parent)
                copy(file, made / name)
            write_manifest(made, manifest)
            made.rename(here)
    return here


def check_file(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of a file that is no shard; OrpoError if they are not those that the manifest knows."""
    file = folder / name
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != manifest.files.get(name):
        raise OrpoError(
            f"{file}: is missing or was changed since it was written; `orpo verify {folder}` tells more; "
            f"remove {folder} and make it again"
        )
    return content


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """OrpoError naming the first shard that is missing or has another size than the manifest says."""
    size_of = _size if is_local(folder) else _listed(folder)
    for shard in (*manifest.shards, *manifest.dropped):
        _check_size(folder / shard.path, shard, size_of(folder / shard.path))


def _check_size(file: Path, shard: Shard, size: int | None) -> None:
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise OrpoError(f"{file}: {found}, the manifest says {shard.bytes}; `orpo verify` tells more")


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _listed(folder: Path) -> Callable[[Path], int | None]:
    """As `_size` for the files of a folder on a storage, asked for once."""
    sizes = {folder / name: size for name, size in remote_sizes(folder).items()}
    return sizes.get


def select_shards(manifest: Manifest, split: str | None) -> list[Shard]:
    """The shards of one split, of the dropped rows (split="dropped"), or of everything (None)."""
    if split == DROPPED_FOLDER:
        return manifest.dropped
    if split is None or (split == "train" and not manifest.splits):
        return manifest.shards
    if split not in manifest.splits:
        raise OrpoError(f"no split {split!r} in this {manifest.stage} dataset, it has {manifest.splits or ['train']}")
    return [shard for shard in manifest.shards if shard.split == split]


def read_table(folder: Path, split: str | None = None) -> pa.Table:
    """The rows of a dataset folder as one memory-mapped table, every byte compared with the manifest."""

    def opened(manifest: Manifest) -> pa.Table:
        return pa.concat_tables(opened_shards(folder, select_shards(manifest, split), open_shard))

    return _of_one_version(folder, opened)


def _of_one_version(folder: Path, opened: Callable[[Manifest], T]) -> T:
    """What is `opened` by the folder's manifest; once more where a newer folder took its place meanwhile."""
    manifest = read_manifest(folder)
    while True:
        try:
            check_sizes(folder, manifest)
            return opened(manifest)
        except OrpoError:
            newer = read_manifest(folder)
            if newer.content_hash == manifest.content_hash:
                raise
            manifest = newer


def iter_tables(folder: Path, manifest: Manifest, batch_rows: int) -> Iterator[tuple[str | None, pa.Table]]:
    """Every row of a dataset in order, as (split, table of at most `batch_rows` rows)."""
    for shard, table in zip(manifest.shards, opened_shards(folder, manifest.shards, open_shard), strict=True):
        yield from ((shard.split, batch) for batch in batches_of(table, batch_rows))


def load(path: str | Path, split: str = "train") -> "datasets.Dataset":
    """A split as a memory-mapped `datasets.Dataset`, every byte compared with the manifest.

    Before the split stage a dataset is one whole, which "train" names; "dropped" opens the dropped rows.
    """
    from datasets import Dataset, concatenate_datasets

    folder = as_path(path)

    def opened(manifest: Manifest) -> Dataset:
        shards = select_shards(manifest, split)
        parts = list(opened_shards(folder, shards, lambda file: Dataset.from_file(str(file))))
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts)

    return _of_one_version(folder, opened)


def stream(path: str | Path, split: str = "train") -> "datasets.IterableDataset":
    """A split as a `datasets.IterableDataset`: rows in order, from one shard while the next ones are on their way.

    `datasets.distributed.split_dataset_by_node` gives each rank its share and torch's DataLoader each of its workers
    some shards of it, without overlap or loss. Only the shards that a process reads are fetched from a storage.
    """
    from datasets import Features, IterableDataset

    folder = as_path(path)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    shards = select_shards(manifest, split)
    with (folder / shards[0].path).open("rb") as file:
        features = Features.from_arrow_schema(pa.ipc.open_stream(file).schema)
    return IterableDataset.from_generator(_rows, features, gen_kwargs={"folder": str(folder), "shards": shards})


def _rows(folder: str, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    for table in opened_shards(as_path(folder), shards, open_shard):
        for batch in table.to_batches():
            yield from batch.to_pylist()


def scan(path: str | Path, split: str | None = None) -> "pl.LazyFrame":
    """A split, or with None every split, as a polars LazyFrame over the same bytes."""
    import polars as pl

    frame = pl.from_arrow(read_table(as_path(path), split), rechunk=False)
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy()
