"""Downloads: each file once, its bytes checked, in order and ahead of who reads them."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orpo_data import cache
from orpo_data.cache import bring, cache_folder, cached, deliver, fetch, fetch_ahead
from orpo_data.errors import OrpoError
from orpo_data.places import storage


@pytest.fixture
def put(memory: Path) -> Callable[[str], tuple[Path, str]]:
    """A file of the storage with a text, and its sha256."""

    def put(text: str) -> tuple[Path, str]:
        file = memory / f"{text}.arrow"
        file.write_bytes(text.encode())
        return file, hashlib.sha256(text.encode()).hexdigest()

    return put


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are downloaded from now on."""
    made, download = list[str](), cache.download

    def count(fs: Any, name: str) -> Path:
        made.append(Path(name).name)
        return download(fs, name)

    monkeypatch.setattr(cache, "download", count)
    return made


def test_a_file_is_downloaded_once_whatever_it_is_called(put: Any, downloads: list[str], memory: Path) -> None:
    file, sha256 = put("same")
    (memory / "other").write_bytes(b"same")
    assert fetch(file, sha256) == fetch(memory / "other", sha256) == cached(sha256)
    assert cached(sha256).read_bytes() == b"same"
    assert downloads == [file.name]


def test_a_version_of_a_file_is_brought_once(put: Any, downloads: list[str]) -> None:
    file, sha256 = put("first")
    for _ in range(2):
        assert bring(*storage(file)) == cached(sha256)
    assert downloads == [file.name]
    file.write_bytes(b"other")  # as long as before
    assert bring(*storage(file)).read_bytes() == b"other"
    cached(hashlib.sha256(b"other").hexdigest()).unlink()
    assert bring(*storage(file)).read_bytes() == b"other"
    assert downloads == [file.name] * 3


def test_a_file_that_is_written_while_it_comes_is_brought_again(put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = put("first")
    download = cache.download

    def and_write(fs: Any, name: str) -> Path:
        new = download(fs, name)
        file.write_bytes(b"other")
        return new

    with monkeypatch.context() as patch:
        patch.setattr(cache, "download", and_write)
        assert bring(*storage(file)).read_bytes() == b"first"
    assert bring(*storage(file)).read_bytes() == b"other"


def test_who_comes_at_the_same_time_waits(put: Any, downloads: list[str]) -> None:
    file, sha256 = put("wanted by many")
    start = threading.Barrier(6)

    def ask(_: int) -> Path:
        start.wait()
        return fetch(file, sha256)

    with ThreadPoolExecutor(6) as pool:
        assert {*pool.map(ask, range(6))} == {cached(sha256)}
    assert downloads == [file.name]


def test_other_bytes_are_refused_and_not_kept(put: Any) -> None:
    file, sha256 = put("right")
    file.write_bytes(b"wrong")
    with pytest.raises(OrpoError, match=r"right\.arrow: its bytes changed"):
        fetch(file, sha256)
    assert not cached(sha256).exists()
    assert list((cache_folder() / "scratch").iterdir()) == []
    file.write_bytes(b"right")
    assert fetch(file, sha256).read_bytes() == b"right"


def test_a_local_file_is_its_own_copy(tmp_path: Path) -> None:
    assert fetch(tmp_path / "file", "unknown") == tmp_path / "file"


@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_files_come_in_order_and_ahead(put: Any, downloads: list[str], count: int) -> None:
    files = [put(f"number {i}") for i in range(count)]
    coming = fetch_ahead(iter(files), ahead=3)
    for i, file in enumerate(coming):
        assert file.read_text() == f"number {i}"
        assert len(downloads) <= i + 4  # no more than asked for
    assert len(downloads) == count


def test_what_is_sent_to_a_storage_stays_here(put: Any, downloads: list[str], memory: Path) -> None:
    scratch = cache.scratch_file()
    scratch.write_bytes(b"new")
    sha256 = hashlib.sha256(b"new").hexdigest()
    deliver(scratch, memory / "new.arrow", sha256)
    assert (memory / "new.arrow").read_bytes() == fetch(memory / "new.arrow", sha256).read_bytes() == b"new"
    assert downloads == []
    assert not scratch.exists()
