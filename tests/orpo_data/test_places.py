"""A path or a URL: the same few things can be done with the files there."""

import os
from pathlib import Path

import pytest

from orpo_data.errors import UsageError
from orpo_data.places import (
    append,
    as_path,
    copy,
    file_names,
    is_local,
    join,
    make_folder,
    remove_folder,
    send,
    without_secrets,
)
from orpo_data.provenance import relative_path


def test_what_is_no_url_is_a_path() -> None:
    assert as_path("runs/my run") == Path("runs/my run")
    assert as_path("file:///data/my%20run") == Path("/data/my run")
    assert all(is_local(as_path(path)) for path in ("runs", Path("runs"), "file:///data"))


def test_a_url_is_never_taken_for_a_local_file() -> None:
    remote = as_path("memory://bucket/run/")
    assert not is_local(remote)
    assert str(remote) == "memory://bucket/run"
    with pytest.raises(TypeError):
        os.fspath(remote)
    assert as_path(remote) is remote


@pytest.mark.parametrize(
    "url",
    ["s3://KEY:hunter2@bucket/run", "s3://hunter2@bucket/run", "https://host/run?X-Amz-Signature=hunter2"],
)
def test_secrets_do_not_belong_in_addresses(url: str) -> None:
    with pytest.raises(UsageError, match="environment") as caught:
        as_path(url)
    assert "hunter2" not in str(caught.value)
    assert "KEY" not in str(caught.value).partition(":")[0]


def test_what_only_looks_like_an_address_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"^s3://\*\*\*: is no address: "):
        as_path("s3://user:planted@[bucket/run")
    assert without_secrets(["s3://user:planted@[bucket"]) == ["s3://***"]


def test_an_unknown_storage_is_named() -> None:
    with pytest.raises(UsageError, match="nowhere://bucket"):
        as_path("nowhere://bucket/run")


@pytest.mark.parametrize(
    ("folder", "relative", "joined"),
    [
        ("memory://bucket/run/clean", "../split", "memory://bucket/run/split"),
        ("memory://bucket/run/clean", "memory://other/run", "memory://other/run"),
        ("memory://bucket/run/clean", "/data/split", "/data/split"),
        ("/data/clean", "memory://bucket/split", "memory://bucket/split"),
        ("/data/clean", "../split", "/data/clean/../split"),
    ],
)
def test_what_lies_beside_a_folder(folder: str, relative: str, joined: str) -> None:
    assert str(join(as_path(folder), relative)) == joined


@pytest.mark.parametrize(
    ("folder", "start"),
    [
        ("memory://bucket/run/split", "memory://bucket/run/clean"),
        ("memory://bucket/run/ingest/hh", "memory://bucket/run/binarize"),
        ("memory://bucket/run/split", "/data/clean"),
        ("/data/split", "memory://bucket/run/clean"),
        ("/data/split", "/data/run/clean"),
    ],
)
def test_a_relative_path_leads_back(folder: str, start: str) -> None:
    back = join(as_path(start), relative_path(as_path(folder), as_path(start)))
    assert os.path.normpath(str(back)) == os.path.normpath(folder)


def test_a_storage_moved_as_a_whole_keeps_its_links() -> None:
    run = [as_path(f"memory://bucket/run/{stage}") for stage in ("split", "clean")]
    assert relative_path(*run) == "../split"


def test_files_of_a_folder(anywhere: Path) -> None:
    assert file_names(anywhere / "absent") == []
    make_folder(anywhere / "out/sub")
    append(anywhere / "out/log", "one\n")
    append(anywhere / "out/log", "two\n")
    copy(anywhere / "out/log", anywhere / "out/sub/log")
    (anywhere / "output").write_bytes(b"a neighbour")
    assert sorted(file_names(anywhere / "out")) == ["log", "sub/log"]
    assert (anywhere / "out/sub/log").read_bytes() == b"one\ntwo\n"
    remove_folder(anywhere / "out")
    remove_folder(anywhere / "out")
    assert file_names(anywhere / "out") == []
    assert (anywhere / "output").exists()


def test_a_local_file_is_sent(memory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    send(tmp_path / "file", memory / "new/file")
    assert (memory / "new/file").read_bytes() == b"content"
