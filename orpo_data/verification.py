"""Checks every file of a dataset folder against its manifest."""

from dataclasses import dataclass
from pathlib import Path

from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Manifest, Shard, digest, manifest_text, read_manifest
from orpo_data.places import as_path, file_sha256
from orpo_data.shards import list_files, open_shard


@dataclass(frozen=True)
class VerifyReport:
    """What is sound and what is not: `problems` has one line for each, naming the file."""

    path: Path
    files: int
    rows: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: str | Path) -> VerifyReport:
    """Read every byte of a dataset or model folder and compare it with the manifest."""
    folder = as_path(path)
    try:
        manifest = read_manifest(folder)
    except OrpoError as error:
        return VerifyReport(folder, files=0, rows=0, problems=(str(error),))
    shards = [*manifest.shards, *manifest.dropped]
    problems = [line for shard in shards for line in _check_shard(folder, shard)]
    problems += [line for name, sha256 in manifest.files.items() for line in _check_file(folder, name, sha256)]
    expected = {shard.path for shard in shards} | manifest.files.keys()
    problems += [f"{folder / name}: not in the manifest" for name in list_files(folder) if name not in expected]
    problems += _check_hashes(folder, manifest)
    if not problems and (folder / MANIFEST_NAME).read_bytes() != manifest_text(manifest).encode():
        problems.append(f"{folder / MANIFEST_NAME}: its bytes changed, though it says the same")
    return VerifyReport(folder, files=len(expected), rows=manifest.rows, problems=tuple(problems))


def _check_file(folder: Path, name: str, sha256: str) -> list[str]:
    file = folder / name
    if not file.is_file():
        return [f"{file}: missing"]
    return [] if file_sha256(file) == sha256 else [f"{file}: its bytes changed (sha256 differs from the manifest)"]


def _check_shard(folder: Path, shard: Shard) -> list[str]:
    problems = _check_file(folder, shard.path, shard.sha256)
    if problems or not shard.path.endswith(".arrow"):
        return problems
    rows = len(open_shard(folder / shard.path, shard.sha256))
    return [] if rows == shard.rows else [f"{folder / shard.path}: {rows} rows, the manifest says {shard.rows}"]


def _check_hashes(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    if digest(manifest.key) != manifest.fingerprint:
        problems.append(f"{folder}: the fingerprint does not follow from the key")
    if content_hash(manifest.shards, manifest.dropped) != manifest.content_hash:
        problems.append(f"{folder}: the content hash does not follow from the shards")
    return problems


def content_hash(shards: list[Shard], dropped: list[Shard]) -> str:
    """One hash for all rows kept and dropped, from the shards' own."""
    return digest([[shard.path, shard.sha256] for shard in (*shards, *dropped)])
