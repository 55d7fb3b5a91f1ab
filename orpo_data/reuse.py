"""What an earlier run of a stage left that this one can take over: parts of its output, and notes on parts.

Nothing is taken on trust: a shard counts only if its bytes are still those of the manifest, a note only if they are
those of its name.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import orjson
import pyarrow as pa

from orpo_data.cache import bring, fetch, move_all
from orpo_data.errors import OrpoError
from orpo_data.folders import STAMPS_NAME
from orpo_data.manifest import PartRecord, Shard, read_manifest
from orpo_data.places import copy, file_sha256, is_local, make_folder, storage, storage_stamp
from orpo_data.shards import DROPPED_FOLDER, open_shard
from orpo_data.writing import WrittenShard

PARTS_NAME = "_parts.json"
NOTES_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{64}\.arrow")  # hash of what they depend on, and of their bytes


def write_part_records(folder: Path, records: Sequence[PartRecord]) -> None:
    """Say what the parts came to, in the order of their rows."""
    document = [record.model_dump() for record in records]
    (folder / PARTS_NAME).write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")


@dataclass(frozen=True)
class EarlierPart:
    """A part of the output that stands: its record, shards and dropped rows."""

    record: PartRecord
    shards: list[tuple[Path, Shard]]
    dropped: pa.Table

    def link(self, folder: Path) -> list[tuple[str | None, WrittenShard]]:
        """Its shards once more, in `folder`, which is created."""
        make_folder(folder)
        linked = []
        for i, (file, shard) in enumerate(self.shards):
            place = copy(file, folder / str(i))
            linked.append((shard.split, WrittenShard(place, shard.rows, shard.tokens, shard.bytes, shard.sha256)))
        return linked


class Earlier:
    """The output that stands in a folder, part by part; empty where there is none or it is damaged."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._parts: dict[str, tuple[PartRecord, int]] = {}  # and where its dropped rows begin
        self._shards: dict[str, Shard] = {}
        self._files: dict[str, str] = {}
        try:
            manifest = read_manifest(output)
        except OrpoError:
            return
        file = output / PARTS_NAME
        if not file.is_file() or file_sha256(file) != manifest.files.get(PARTS_NAME):
            return
        self._files = manifest.files
        self._shards = {shard.path: shard for shard in (*manifest.shards, *manifest.dropped)}
        start = 0
        for entry in orjson.loads(file.read_bytes()):
            record = PartRecord.model_validate(entry)
            self._parts[record.key] = record, start
            start += record.dropped

    def part(self, key: str) -> EarlierPart | None:
        """What the part of this key came to, if every byte of it still lies there."""
        if key not in self._parts:
            return None
        record, start = self._parts[key]
        shards = [(self._output / path, self._shards[path]) for path in record.shards]
        if (record.dropped and self._dropped is None) or not all(self._sound(path) for path in record.shards):
            return None
        table = pa.table({}) if self._dropped is None else self._dropped.slice(start, record.dropped)
        return EarlierPart(record, shards, table)

    @cached_property
    def _dropped(self) -> pa.Table | None:
        """The dropped rows, where all of them are sound."""
        paths = [path for path in self._shards if path.startswith(f"{DROPPED_FOLDER}/")]
        if not all(self._sound(path) for path in paths):
            return None
        return pa.concat_tables([open_shard(self._output / path, self._shards[path].sha256) for path in paths])

    def _sound(self, path: str) -> bool:
        """Whether the bytes are those of the manifest; on a storage that still says so, without reading them."""
        file = self._output / path
        if not file.is_file():
            return False
        if path in self._stamps and self._stamps[path] == storage_stamp(*storage(file)):
            return True
        return file_sha256(file) == self._shards[path].sha256

    @cached_property
    def _stamps(self) -> dict[str, str]:
        """What the storage said of the files when they were written there; nothing of what was copied there later."""
        file = self._output / STAMPS_NAME
        if STAMPS_NAME not in self._files or not file.is_file():
            return {}
        content = file.read_bytes()
        sound = hashlib.sha256(content).hexdigest() == self._files[STAMPS_NAME]
        return orjson.loads(content) if sound else {}


def open_notes(file: Path) -> pa.Table:
    """Notes that were kept."""
    return open_shard(file, _sha256_of(file))


def _sha256_of(file: Path) -> str:
    """What the bytes of notes should hash to, by the name they are kept under."""
    return file.stem.rpartition("-")[2]


def _is_sound_note(file: Path) -> bool:
    try:
        return file_sha256(fetch(file, _sha256_of(file))) == _sha256_of(file)
    except OrpoError:
        return False


class NoteCache:
    """Notes that global steps took on parts, kept beside the output under the hash of all they depend on."""

    def __init__(self, output: Path) -> None:
        self._folder = output.parent / f".{output.name}.notes"
        if is_local(self._folder) and self._folder.is_symlink():  # it would lead what is kept somewhere else
            self._folder.unlink()
        self._found: dict[str, list[Path]] = {}  # by key
        self._used: set[Path] = set()
        for file in self._files():
            self._found.setdefault(file.name.split("-")[0], []).append(file)

    def _files(self) -> list[Path]:
        """Every note that lies there; what is no note of ours is none of our business."""
        files = list(self._folder.iterdir()) if self._folder.is_dir() else []
        return [file for file in files if NOTES_NAME.fullmatch(file.name)]

    def find(self, key: str) -> Path | None:
        for file in self._found.get(key, []):
            if _is_sound_note(file):
                self._used.add(file)
                return file
        return None

    def keep(self, key: str, notes: Path) -> Path:
        """Move a file of notes here."""
        make_folder(self._folder)
        sha256 = file_sha256(notes if is_local(notes) else bring(*storage(notes)))
        file = self._folder / f"{key}-{sha256}.arrow"
        self._used.add(file)
        move_all([(notes, file, sha256)])
        return file

    def prune(self) -> None:
        """Remove the notes that this run had no use for, and the folder if nothing is left there."""
        for file in self._files():
            if file not in self._used:
                file.unlink()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()
