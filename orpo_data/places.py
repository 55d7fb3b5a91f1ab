"""Where files lie: on this machine, or behind a URL that fsspec knows.

What takes a `Path` here also takes what `as_path` gives for a URL: a UPath of universal_pathlib, which has pathlib's
methods and is no `os.PathLike`, so what works on local files only fails on it and never looks in a wrong place.
An object store neither renames nor appends; a file arrives there whole or not at all.
"""

import hashlib
import os
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from orpo_data.errors import OrpoError, UsageError

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}
"""Folders are not made there, and listings are not kept: other machines write too."""


def as_path(path: str | Path) -> Path:
    """A folder or file by its path or URL.

    Raises UsageError for a URL that fsspec cannot open here, and for one that holds a password or a signature: it
    would be printed and written down with every dataset.
    """
    if not isinstance(path, str) or "://" not in path:
        return Path(path) if isinstance(path, str) else path
    try:
        parts = urlsplit(path)
    except ValueError as error:
        raise UsageError(f"{without_secrets(path)}: is no address: {error}") from None
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    if parts.username or parts.password or parts.query:
        raise UsageError(
            f"{public_url(path)}: its user, password or signature does not belong in an address; set it in the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...) or in fsspec's configuration"
        )
    from upath import UPath  # brings fsspec, which a local folder has no need of

    try:
        found: Any = UPath(path.rstrip("/"), protocol=None, **client_options(parts.scheme))
        found.fs  # noqa: B018  # opened now: the protocol is known and its package is installed
    except (ImportError, ValueError) as error:
        hint = "; `pip install -e '.[s3]'`" if parts.scheme in ("s3", "s3a") else ""
        raise UsageError(f"{path}: {str(error).splitlines()[0]}{hint}") from None
    return cast(Path, found)


def client_options(scheme: str) -> dict[str, Any]:
    """For fsspec, of storages that others write to as well."""
    return {"use_listings_cache": False} if scheme in OBJECT_STORES else {}


def public_url(url: str) -> str:
    """A URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def redacted(text: str, url: str) -> str:
    """`text` on one line, without what only the owner of the address `url` may know."""
    parts = urlsplit(url)
    text = " ".join(text.split()).replace(url, public_url(url))
    for secret in filter(None, (parts.password, parts.query, parts.username, parts.fragment)):
        for form in {secret, unquote(secret)}:
            text = text.replace(form, "***")
    return text


def without_secrets(value: Any) -> Any:
    """Settings whose addresses hold neither passwords nor signatures."""
    if isinstance(value, Mapping):
        return {name: without_secrets(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    if isinstance(value, str) and "://" in value:
        try:
            parts = urlsplit(value)
        except ValueError:  # no address, but perhaps meant to be one
            return f"{value.partition('://')[0]}://***"
        return public_url(value) if parts.username or parts.password or parts.query or parts.fragment else value
    return value


def is_local(path: Path) -> bool:
    return isinstance(path, os.PathLike)


def storage(path: Path) -> tuple[Any, str]:
    """The file system of a place that is not local, and its name there."""
    remote = cast(Any, path)
    return remote.fs, remote.path


def join(folder: Path, relative: str) -> Path:
    """What lies at `relative`, which may begin with `..` or be a URL or an absolute path."""
    if "://" in relative:
        return as_path(relative)
    if is_local(folder) or posixpath.isabs(relative):
        return Path(relative) if posixpath.isabs(relative) else folder / relative
    scheme, _, below = str(folder).partition("://")
    return as_path(f"{scheme}://{posixpath.normpath(posixpath.join(below, relative))}")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_names(folder: Path) -> list[str]:
    """Every file below `folder`, as relative posix paths."""
    if is_local(folder):
        files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
        return [file.relative_to(folder).as_posix() for file in files]
    return list(remote_sizes(folder))


def remote_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder that is not local, by relative posix path, from one listing."""
    fs, root = storage(folder)
    root = root.strip("/")
    found = fs.find(root, detail=True).items()
    return {name.strip("/").removeprefix(f"{root}/"): info["size"] for name, info in found}


def storage_stamp(fs: Any, name: str) -> str:
    """Size, and what the storage itself tells versions of a file apart by (for S3 the ETag)."""
    return f"{fs.size(name)}-{fs.checksum(name):x}"


def make_folder(folder: Path) -> None:
    """Create a folder and those above it; an object store has none."""
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    else:
        fs, root = storage(folder)
        if urlsplit(str(folder)).scheme not in OBJECT_STORES:
            fs.makedirs(root, exist_ok=True)


def send(file: Path, to: Path) -> None:
    """Put a local file at a place that is not."""
    from orpo_data.network import persistently  # slow to import, and only needed here

    fs, name = storage(to)
    make_folder(to.parent)
    with _told(to):
        persistently(to.name, lambda: fs.put_file(str(file), name))


@contextmanager
def _told(to: Path) -> Iterator[None]:
    """A storage that has no such bucket does not say which."""
    try:
        yield
    except FileNotFoundError as error:
        raise OrpoError(f"{to}: cannot be written: {error}") from None


def copy(file: Path, to: Path) -> Path:
    """The same bytes at another place: without a copy where the file system can, without a download on a storage."""
    if not is_local(file):
        from orpo_data.network import persistently

        (fs, name), (_, copied) = storage(file), storage(to)
        make_folder(to.parent)
        persistently(file.name, lambda: fs.cp_file(name, copied))
        return to
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
    return to


def write_whole(file: Path, text: str) -> None:
    """Put a text at a place of this machine, in one piece: whoever is killed meanwhile leaves what was there."""
    make_folder(file.parent)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, file)


def append(file: Path, text: str) -> None:
    """Write `text` behind what the file holds; on a storage the file is written anew."""
    if is_local(file):
        with file.open("a") as stream:
            stream.write(text)
    else:
        before = file.read_bytes() if file.exists() else b""
        with _told(file):
            file.write_bytes(before + text.encode())


def remove_folder(folder: Path) -> None:
    """The manifest goes first: what is removed in part opens no more."""
    if is_local(folder):
        if folder.is_symlink():  # what it points to is somebody else's
            folder.unlink()
            return
        (folder / "_manifest.json").unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
    elif remote_sizes(folder):
        fs, root = storage(folder)
        fs.rm(root, recursive=True)
