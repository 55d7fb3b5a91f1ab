"""Where a dataset can be pushed to. Each target takes files in order, the manifest last, and says what it removed."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import orjson

from orpo_data.errors import OrpoError, UsageError
from orpo_data.folders import commit_folder, refuse_foreign_files, refuse_foreign_folder
from orpo_data.locking import writing
from orpo_data.manifest import MANIFEST_NAME, Manifest
from orpo_data.places import public_url, redacted, remove_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_OWN_FILES = {".gitattributes", "README.md"}
"""What a hub repository may hold before anything was pushed to it."""

PENDING_NAME = "_push.json"
"""Lies at a target while files are on their way and names all of them, so that the next push can tidy up."""


class Target(Protocol):
    """A place for one dataset; `url` is for people, without passwords."""

    url: str

    def put(self, files: Mapping[str, Path], manifest: Manifest) -> list[str]:
        """Send every file; returns those of an earlier push that were removed. OrpoError if something else is there."""
        ...


def find_target(to: str, *, public: bool = False) -> Target:
    """The target that `to` names: a hub id, a URL, or a folder. UsageError if it is none of them."""
    if to.startswith("hf://datasets/"):
        to = to.removeprefix("hf://datasets/").rstrip("/")
        if not HUB_ID.fullmatch(to):
            raise UsageError(
                f"hf://datasets/{to}: a dataset is pushed to a whole repository, hf://datasets/name/dataset"
            )
        return HubTarget(to, public)
    if "://" in to:
        return FolderTarget(unquote(urlsplit(to).path)) if to.startswith("file://") else UrlTarget(to)
    if to.startswith((".", "~")) or os.path.isabs(to):
        return FolderTarget(os.path.expanduser(to))
    if HUB_ID.fullmatch(to):
        return HubTarget(to, public)
    raise UsageError(f"--to {to!r}: neither a hub id (name/dataset) nor a URL nor a folder (write ./{to} for a folder)")


class FolderTarget:
    """A folder of this machine, replaced as a whole by one rename."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(os.path.abspath(folder))  # "." has no name of its own
        self.url = str(self.folder)

    def put(self, files: Mapping[str, Path], manifest: Manifest) -> list[str]:
        with writing(self.folder):
            return self._put(files, manifest)

    def _put(self, files: Mapping[str, Path], manifest: Manifest) -> list[str]:
        refuse_foreign_folder(self.folder)
        refuse_foreign_files(self.folder)
        earlier = self.folder / MANIFEST_NAME
        old = _names_in(earlier.read_bytes(), self.url) if earlier.exists() else set()
        work = self.folder.parent / f".{self.folder.name}.partial"
        remove_folder(work)
        try:
            for name, file in files.items():
                if name != MANIFEST_NAME:
                    (work / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, work / name)
            commit_folder(work, self.folder, manifest)
        finally:
            remove_folder(work)
        return sorted(old - files.keys())


class UrlTarget:
    """Anything that fsspec can write to: the manifest is taken away first and comes back last."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = public_url(url)
        try:
            self.fs, self.root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UsageError(f"--to {self.url}: {redacted(str(error), url)}") from None
        self._secret_url = url

    def put(self, files: Mapping[str, Path], manifest: Manifest) -> list[str]:
        try:
            return self._put(files)
        except NotImplementedError:
            raise OrpoError(f"{self.url}: can only be read; choose another place") from None
        except OSError as error:
            reason = redacted(str(error), self._secret_url)
            raise OrpoError(f"{self.url}: not everything arrived ({reason}); push again to finish") from None

    def _put(self, files: Mapping[str, Path]) -> list[str]:
        self.fs.invalidate_cache()
        old = self._names_there()
        self._write(PENDING_NAME, orjson.dumps(sorted({*old, *files})))
        if self.fs.exists(self._at(MANIFEST_NAME)):
            self.fs.rm_file(self._at(MANIFEST_NAME))
        stale = sorted(name for name in old - files.keys() if self.fs.exists(self._at(name)))
        for name in stale:
            self.fs.rm_file(self._at(name))
        for name, file in files.items():
            self.fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(file), self._at(name))
        self.fs.rm_file(self._at(PENDING_NAME))
        return stale

    def _names_there(self) -> set[str]:
        """The files of an earlier push, also of one that was interrupted."""
        for name in (PENDING_NAME, MANIFEST_NAME):
            if self.fs.exists(self._at(name)):
                return _names_in(self.fs.cat_file(self._at(name)), self.url)
        if self.fs.exists(self.root) and any(files for _, _, files in self.fs.walk(self.root)):
            raise _foreign(self.url)
        return set()

    def _write(self, name: str, content: bytes) -> None:
        self.fs.makedirs(self.root, exist_ok=True)
        self.fs.pipe_file(self._at(name), content)

    def _at(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"


class HubTarget:
    """A dataset repository of the Hugging Face hub: one commit, so all of it arrives or nothing."""

    def __init__(self, repo: str, public: bool) -> None:
        from huggingface_hub import HfApi

        self.api = HfApi()
        self.repo = repo
        self.public = public
        self.url = f"{self.api.endpoint}/datasets/{repo}"

    def put(self, files: Mapping[str, Path], manifest: Manifest) -> list[str]:
        from orpo_data.hub import HUB_ERRORS, reason

        try:
            self.api.create_repo(self.repo, repo_type="dataset", private=not self.public, exist_ok=True)
            return self._commit(files, manifest)
        except HUB_ERRORS as error:
            told = f"the hub did not take it ({reason(error)}); `hf auth login` signs you in"
            raise OrpoError(f"{self.url}: {told}") from None

    def _commit(self, files: Mapping[str, Path], manifest: Manifest) -> list[str]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        stale = sorted(self._names_there() - files.keys())
        self.api.create_commit(
            self.repo,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, file) for name, file in files.items()),
            ],
            commit_message=f"{manifest.stage}: {manifest.rows:,} rows, {manifest.content_hash[:12]}",
            repo_type="dataset",
        )
        return stale

    def _names_there(self) -> set[str]:
        """The files of an earlier push that are in the repository still."""
        there = set(self.api.list_repo_files(self.repo, repo_type="dataset"))
        if MANIFEST_NAME in there:
            content = Path(self.api.hf_hub_download(self.repo, MANIFEST_NAME, repo_type="dataset")).read_bytes()
            return there & _names_in(content, self.url)
        if there - HUB_OWN_FILES:
            raise _foreign(self.url)
        return set()


def _foreign(url: str) -> OrpoError:
    return OrpoError(f"{url}: holds something else (no {MANIFEST_NAME} of this project); choose another place")


def _names_in(content: bytes, url: str) -> set[str]:
    """The files that a manifest of whatever version, or a list of names, tells of."""
    try:
        document: Any = orjson.loads(content)
        if isinstance(document, list):
            return set(_local(document))
        shards = [shard["path"] for part in ("shards", "dropped") for shard in document[part]]
        return {*_local([*shards, *document["files"]]), MANIFEST_NAME}
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise _foreign(url) from None


def _local(names: Iterable[str]) -> Iterable[str]:
    """Only names that stay below the target: what is removed by them came from elsewhere."""
    return (name for name in names if not name.startswith("/") and ".." not in name.split("/"))
