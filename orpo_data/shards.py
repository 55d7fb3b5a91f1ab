"""Dataset folders: written atomically, opened without a copy, verified byte by byte.

A folder holds uncompressed Arrow IPC *stream* files of a fixed 1,000 rows a record batch, exactly what
`datasets.load_from_disk` memory-maps. It comes into being by one rename, so it is complete or absent.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Manifest, Shard, digest, read_manifest, write_manifest
from orpo_data.schema import DROPPED

if TYPE_CHECKING:
    import datasets
    import polars as pl

ROWS_PER_BATCH = 1_000
ROWS_PER_SHARD = 50_000  # a whole number of batches, so that shards do not depend on how rows arrived
DROPPED_FOLDER = "dropped"
DATASETS_CACHE = re.compile(r"cache-\w+\.arrow")


def shard_name(index: int, count: int) -> str:
    return f"data-{index:05d}-of-{count:05d}.arrow"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes one split: rows come in tables of any size and leave in shards of fixed size."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._shards: list[tuple[Path, int, int | None]] = []  # file, rows, tokens
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, table: pa.Table) -> None:
        self._pending.append(table.select(self.schema.names).cast(self.schema))
        self._pending_rows += len(table)
        if self._pending_rows >= ROWS_PER_BATCH:
            whole = self._pending_rows - self._pending_rows % ROWS_PER_BATCH
            rows = pa.concat_tables(self._pending)
            for start in range(0, whole, ROWS_PER_BATCH):
                self._write_batch(rows.slice(start, ROWS_PER_BATCH))
            self._pending, self._pending_rows = [rows.slice(whole)], self._pending_rows - whole

    def close(self) -> list[tuple[str, int, int | None]]:
        """Write what is left and give the shards their final names: (name, rows, tokens) of each."""
        if self._pending_rows:
            self._write_batch(pa.concat_tables(self._pending))
        if not self._shards:
            self._open_shard()
        self._close_shard()
        named = []
        for index, (file, rows, tokens) in enumerate(self._shards):
            name = shard_name(index, len(self._shards))
            file.rename(self.folder / name)
            named.append((name, rows, tokens))
        self._write_datasets_files([name for name, _, _ in named])
        return named

    def _write_batch(self, rows: pa.Table) -> None:
        if self._stream is None or self._shards[-1][1] >= ROWS_PER_SHARD:
            self._close_shard()
            self._open_shard()
        assert self._stream is not None
        # take() makes fresh, unsliced buffers: the bytes depend on the rows alone, not on how they arrived
        batch = rows.take(pa.array(range(len(rows)), pa.int64())).combine_chunks().to_batches()[0]
        self._stream.write_batch(batch)
        file, count, tokens = self._shards[-1]
        self._shards[-1] = (file, count + len(rows), None if tokens is None else tokens + _count_tokens(rows))

    def _open_shard(self) -> None:
        file = self.folder / f"part-{len(self._shards):05d}"
        self._shards.append((file, 0, 0 if "chosen_input_ids" in self.schema.names else None))
        self._stream = pa.ipc.new_stream(str(file), self.schema)

    def _close_shard(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write_datasets_files(self, names: list[str]) -> None:
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": digest([file_sha256(self.folder / name) for name in names])[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self.folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        (self.folder / "dataset_info.json").write_text("{}\n")


def _count_tokens(rows: pa.Table) -> int:
    lengths = (pc.sum(pc.list_value_length(rows[name])).as_py() for name in ("chosen_input_ids", "rejected_input_ids"))
    return sum(length or 0 for length in lengths)


class DatasetWriter:
    """Writes a dataset folder beside its final place and moves it there whole.

    Used as a context manager: leaving it without `commit` removes what was written. A folder that a killed run left
    behind is removed by the next one.
    """

    def __init__(self, output: Path, schema: pa.Schema) -> None:
        refuse_foreign_folder(output)
        refuse_foreign_files(output)
        self.output = output
        self.schema = schema
        self.folder = output.parent / f".{output.name}.partial"
        self._writers: dict[str | None, ShardWriter] = {}

    def __enter__(self) -> Self:
        remove_folder(self.folder)
        self.folder.mkdir(parents=True)
        self._dropped = ShardWriter(self.folder / DROPPED_FOLDER, DROPPED)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        remove_folder(self.folder)

    def declare_splits(self, names: list[str]) -> None:
        """Create these splits even if no row goes there."""
        for name in names:
            self._writer(name)

    def write(self, table: pa.Table, split: str | None = None) -> None:
        self._writer(split).write(table)

    def write_dropped(self, table: pa.Table) -> None:
        self._dropped.write(table)

    def _writer(self, split: str | None) -> ShardWriter:
        if split not in self._writers:
            self._writers[split] = ShardWriter(self.folder / (split or ""), self.schema)
        return self._writers[split]

    def close(self) -> tuple[list[Shard], list[Shard]]:
        """Finish the files: the shards of the data and of the dropped rows."""
        if not self._writers:
            self._writer(None)
        shards = [s for split, writer in self._writers.items() for s in self._close(writer, split, split)]
        splits = [split for split in self._writers if split is not None]
        if splits:
            (self.folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}) + "\n")
        return shards, self._close(self._dropped, None, DROPPED_FOLDER)

    def _close(self, writer: ShardWriter, split: str | None, subfolder: str | None) -> list[Shard]:
        shards = []
        for name, rows, tokens in writer.close():
            file = writer.folder / name
            path = f"{subfolder}/{name}" if subfolder else name
            size, sha256 = file.stat().st_size, file_sha256(file)
            shards.append(Shard(path=path, split=split, rows=rows, tokens=tokens, bytes=size, sha256=sha256))
        return shards

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and move the folder to its place."""
        commit_folder(self.folder, self.output, manifest)


def commit_folder(folder: Path, output: Path, manifest: Manifest) -> None:
    """Make `folder`, complete but for its manifest, the dataset folder or model folder `output`."""
    known = {shard.path for shard in (*manifest.shards, *manifest.dropped)}
    files = {name: file_sha256(folder / name) for name in list_files(folder) if name not in known}
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    refuse_foreign_files(output)
    if output.exists():
        output.rename(_stale(output))
    try:
        folder.rename(output)
    finally:
        _finish_move(output)


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


def list_files(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, as sorted relative posix paths.

    The caches that `datasets` puts beside a memory-mapped dataset (`map`, `filter`) are nobody's: they are passed over.
    """
    files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    ours = (file for file in files if file != folder / MANIFEST_NAME and not DATASETS_CACHE.fullmatch(file.name))
    return sorted(file.relative_to(folder).as_posix() for file in ours)


def open_shard(path: Path) -> pa.Table:
    """One shard, memory-mapped; OrpoError if it cannot be read."""
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise OrpoError(f"{path}: unreadable shard ({error})") from None


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """OrpoError naming the first shard that is missing or has another size than the manifest says."""
    for shard in (*manifest.shards, *manifest.dropped):
        file = folder / shard.path
        size = file.stat().st_size if file.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise OrpoError(f"{file}: {found}, the manifest says {shard.bytes}; `orpo verify` tells more")


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
    """The rows of a dataset folder as one memory-mapped table, the manifest checked."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    return pa.concat_tables([open_shard(folder / shard.path) for shard in select_shards(manifest, split)])


def iter_tables(folder: Path, manifest: Manifest, batch_rows: int) -> Iterator[tuple[str | None, pa.Table]]:
    """Every row of a dataset in order, as (split, table of at most `batch_rows` rows)."""
    for shard in manifest.shards:
        table = open_shard(folder / shard.path)
        for start in range(0, len(table), batch_rows):
            yield shard.split, table.slice(start, batch_rows)


def load(path: str | Path, split: str = "train") -> "datasets.Dataset":
    """A split as a memory-mapped `datasets.Dataset`, the manifest checked.

    Before the split stage a dataset is one whole, which "train" names; "dropped" opens the dropped rows.
    """
    from datasets import Dataset, concatenate_datasets

    folder = Path(path)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    parts = [Dataset.from_file(str(folder / shard.path)) for shard in select_shards(manifest, split)]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def scan(path: str | Path, split: str | None = None) -> "pl.LazyFrame":
    """A split, or with None every split, as a polars LazyFrame over the same bytes."""
    import polars as pl

    frame = pl.from_arrow(read_table(Path(path), split), rechunk=False)
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy()
