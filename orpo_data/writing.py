"""Dataset folders, written: shards whose bytes follow from the rows alone."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from orpo_data.cache import deliver, move_all, scratch_file, scratch_folder
from orpo_data.folders import commit_folder, partial_folder, refuse_foreign_files, refuse_foreign_folder
from orpo_data.manifest import Manifest, Shard, digest
from orpo_data.places import is_local, make_folder, remove_folder
from orpo_data.schema import DROPPED, no_rows
from orpo_data.shards import DROPPED_FOLDER, is_sound, mark_sound

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_BUFFER = 1 << 17
"""Bytes that wait to be written together: each write takes the interpreter's lock. But what Linux gets in one large
write it may keep as one large page, all of which is resident once a byte of it is read."""

ROWS_PER_BATCH = 1_000
ROWS_PER_SHARD = 50_000  # a whole number of batches, so that shards do not depend on how rows arrived
MOST_BYTES_PER_BATCH = 2**31 - 1  # what the 32-bit offsets of texts and lists can tell apart


class StreamFile:
    """An Arrow stream file in the making. One for a storage is made on this machine, and sent there when finished."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._here = path if is_local(path) else scratch_file()
        self._file = self._open(self._here)
        self._sink = pa.BufferedOutputStream(pa.PythonFile(self._file, mode="w"), _BUFFER)
        self._stream = pa.ipc.new_stream(self._sink, schema)

    def _open(self, file: Path) -> IO[bytes]:
        return file.open("wb")

    def write(self, table: pa.Table) -> None:
        self._stream.write_table(table)

    def close(self) -> Path:
        """The finished file on this machine; `deliver` puts it at its path."""
        self._stream.close()
        self._sink.close()
        self._file.close()
        return self._here


class ShardFile(StreamFile):
    """Hashes what it writes, so that a shard need not be read for it."""

    _file: "_Hashed"

    def _open(self, file: Path) -> "_Hashed":
        return _Hashed(file.open("wb", buffering=0))

    @property
    def sha256(self) -> str:
        return self._file.sha256.hexdigest()


class _Hashed(io.BufferedWriter):
    def __init__(self, file: io.RawIOBase) -> None:
        super().__init__(file)
        self.sha256 = hashlib.sha256()

    def write(self, data: "ReadableBuffer", /) -> int:
        self.sha256.update(data)
        return super().write(data)


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard before it has its final name; `tokens` is null where rows hold none."""

    file: Path
    rows: int
    tokens: int | None
    bytes: int
    sha256: str


class ShardWriter:
    """Writes the rows of one split: they come in tables of any size and leave in shards of fixed size."""

    def __init__(self, prefix: Path, schema: pa.Schema) -> None:
        """Files are called `prefix`-00000 and so on."""
        self._prefix = prefix
        self._schema = schema
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._written: list[WrittenShard] = []
        self._stream: ShardFile | None = None
        self._rows = self._tokens = 0  # of the shard that is open

    def write(self, table: pa.Table) -> None:
        if not len(table):
            return
        rows = table.select(self._schema.names)
        self._pending.append(rows if rows.schema == self._schema else rows.cast(self._schema))
        self._pending_rows += len(table)
        if self._pending_rows >= ROWS_PER_BATCH:
            whole = self._pending_rows - self._pending_rows % ROWS_PER_BATCH
            rows = pa.concat_tables(self._pending)
            for start in range(0, whole, ROWS_PER_BATCH):
                self._write_batch(rows.slice(start, ROWS_PER_BATCH))
            self._pending, self._pending_rows = [rows.slice(whole)], self._pending_rows - whole

    def close(self, at_least: int = 0) -> list[WrittenShard]:
        """Write what is left; without any row `at_least` empty shards."""
        if self._pending_rows:
            self._write_batch(pa.concat_tables(self._pending))
        self._close_shard()
        while len(self._written) < at_least:
            self._open_shard()
            self._close_shard()
        return self._written

    def _write_batch(self, rows: pa.Table) -> None:
        if self._stream is None or self._rows >= ROWS_PER_SHARD:
            self._close_shard()
            self._open_shard()
        assert self._stream is not None
        for part in _addressable(rows):
            batch = canonical(part)
            self._stream.write(batch)
            self._rows += len(batch)
            self._tokens += _count_tokens(batch)

    @property
    def _file(self) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}-{len(self._written):05d}")

    def _open_shard(self) -> None:
        self._rows = self._tokens = 0
        make_folder(self._file.parent)
        self._stream = ShardFile(self._file, self._schema)

    def _close_shard(self) -> None:
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        here = stream.close()
        tokens = self._tokens if "chosen_input_ids" in self._schema.names else None
        shard = WrittenShard(self._file, self._rows, tokens, here.stat().st_size, stream.sha256)
        deliver(here, shard.file, shard.sha256)
        if is_local(shard.file):
            mark_sound(shard.file, shard.sha256)
        self._written.append(shard)


def _addressable(rows: pa.Table) -> Iterator[pa.Table]:
    """The rows, halved until the texts of a part can be addressed by the 32-bit offsets of a record batch."""
    if rows.nbytes <= MOST_BYTES_PER_BATCH or len(rows) == 1:
        yield rows
    else:
        yield from _addressable(rows.slice(0, len(rows) // 2))
        yield from _addressable(rows.slice(len(rows) // 2))


def canonical(table: pa.Table) -> pa.Table:
    """The same rows in one batch of fresh, unsliced buffers: their bytes in a file follow from the rows alone."""
    copy = pa.concat_tables([table, no_rows(table.schema)]).combine_chunks()  # two chunks at least, or there is no copy
    return pa.table([_cleared(column) for column in copy.columns], schema=table.schema)


def _cleared(chunked: pa.ChunkedArray) -> pa.Array:
    """A column of one chunk without what lies under a null."""
    (column,) = chunked.chunks
    if column.null_count == len(column):
        return pa.nulls(len(column), column.type)
    return column.take(pa.array(np.arange(len(column)))) if _has_nulls(column) else column


def _has_nulls(column: pa.Array) -> bool:
    """At any depth of an array that is no slice."""
    if column.null_count:
        return True
    if pa.types.is_list(column.type):
        return _has_nulls(column.values)
    return pa.types.is_struct(column.type) and any(_has_nulls(column.field(i)) for i in range(column.type.num_fields))


def _count_tokens(batch: pa.Table) -> int:
    names = [name for name in ("chosen_input_ids", "rejected_input_ids") if name in batch.schema.names]
    return sum(len(ids.flatten()) for name in names for ids in batch[name].chunks)


class DatasetWriter:
    """Writes a dataset folder beside its final place and moves it there whole.

    Used as a context manager: leaving it without `commit` removes what was written. Rows are either written here, or
    come as shards that are finished. `shared`: other machines work on its parts, so those must lie where it will.
    """

    def __init__(self, output: Path, schema: pa.Schema, *, shared: bool = False) -> None:
        refuse_foreign_folder(output)
        refuse_foreign_files(output)
        self.output = output
        self.schema = schema
        self.folder = partial_folder(output)
        self.aside = self.folder / "work"  # for what is gone when the folder is complete
        self.work = self.aside if shared or is_local(output) else scratch_folder(str(output))
        self.placed: dict[Path, str] = {}  # where the shards of `work` have gone
        self._shards: dict[str | None, list[WrittenShard]] = {}
        self._writers: dict[str | None, ShardWriter] = {}

    def __enter__(self) -> Self:
        self._clear()
        make_folder(self.work)
        self._dropped = ShardWriter(self.work / "dropped", DROPPED)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._clear()

    def _clear(self) -> None:
        remove_folder(self.folder)
        remove_folder(self.work)

    def declare_splits(self, names: Iterable[str | None]) -> None:
        """Create these splits even if no row goes there."""
        for name in names:
            self._shards.setdefault(name, [])

    def write(self, table: pa.Table, split: str | None = None) -> None:
        if split not in self._writers:
            self._writers[split] = ShardWriter(self.work / f"rows-{split}", self.schema)
        self._writers[split].write(table)

    def adopt(self, shard: WrittenShard, split: str | None = None) -> None:
        """Take a finished shard in, behind those of its split that came before."""
        self._shards.setdefault(split, []).append(shard)

    def write_dropped(self, table: pa.Table) -> None:
        self._dropped.write(table)

    def close(self) -> tuple[list[Shard], list[Shard]]:
        """Finish the files: the shards of the data and of the dropped rows."""
        for split, writer in self._writers.items():
            for shard in writer.close():
                self.adopt(shard, split)
        if not self._shards:
            self.declare_splits([None])
        shards = [shard for split, written in self._shards.items() for shard in self._place(written, split, split)]
        splits = [split for split in self._shards if split is not None]
        if splits:
            (self.folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}) + "\n")
        dropped = self._place(self._dropped.close(at_least=1), None, DROPPED_FOLDER)
        remove_folder(self.work)
        remove_folder(self.aside)
        return shards, dropped

    def _place(self, written: list[WrittenShard], split: str | None, subfolder: str | None) -> list[Shard]:
        """Give the shards of one split their final names."""
        folder = self.folder / (subfolder or "")
        make_folder(folder)
        if not written:
            written = ShardWriter(self.work / f"empty-{split}", self.schema).close(at_least=1)
        names = [shard_name(index, len(written)) for index in range(len(written))]
        files = [(shard.file, folder / name, shard.sha256) for shard, name in zip(written, names, strict=True)]
        from_here = [is_local(file) and is_sound(file, sha256) for file, _, sha256 in files]
        move_all(files)
        for (_, file, sha256), known in zip(files, from_here, strict=True):
            if known and is_local(file):
                mark_sound(file, sha256)
        placed = []
        for shard, name in zip(written, names, strict=True):
            path = self.placed[shard.file] = f"{subfolder}/{name}" if subfolder else name
            facts = {"rows": shard.rows, "tokens": shard.tokens, "bytes": shard.bytes, "sha256": shard.sha256}
            placed.append(Shard(path=path, split=split, **facts))
        _write_datasets_files(folder, placed)
        return placed

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and move the folder to its place."""
        commit_folder(self.folder, self.output, manifest)


def shard_name(index: int, count: int) -> str:
    return f"data-{index:05d}-of-{count:05d}.arrow"


def _write_datasets_files(folder: Path, shards: Sequence[Shard]) -> None:
    """What `datasets.load_from_disk` wants to see."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": Path(shard.path).name} for shard in shards],
        "_fingerprint": digest([shard.sha256 for shard in shards])[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    (folder / "dataset_info.json").write_text("{}\n")
