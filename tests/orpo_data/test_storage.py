"""A stage into a storage without renames: the same bytes as into a folder, and complete or absent like it."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import orpo_data
from orpo_data.cache import cache_folder
from orpo_data.errors import OrpoError
from orpo_data.folders import STAMPS_NAME
from orpo_data.manifest import MANIFEST_NAME, read_manifest
from orpo_data.places import copy, file_names, file_sha256, send
from orpo_data.reuse import PARTS_NAME, Earlier
from orpo_data.shards import fetch_folder

BEFORE = {"a": (1, 2, 3, 4), "b": (5, 6, 7), "c": (1, 11)}
AFTER = {"d": (8, 9, 10), "b": (5, 6, 7), "c": (1, 12, 13), "e": (3, 3)}
CHAIN = [("without", 3), ("first", 3), ("twice", 4), ("shift", 2)]


class GoneError(OSError):
    """The storage does not answer any more."""


@contextmanager
def going_away(monkeypatch: pytest.MonkeyPatch, after: int | None) -> Iterator[list[str]]:
    """The storage takes so many changes and then nothing more: to it, that is a client that was killed.

    Gives the list of the changes it took.
    """
    taken: list[str] = []

    def change(function: Any) -> Any:
        def changing(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
            if function.__name__ != "_open" or kwargs.get("mode", args[0] if args else "rb") != "rb":
                if len(taken) == after:
                    raise GoneError
                taken.append(path)
            return function(self, path, *args, **kwargs)

        return changing

    with monkeypatch.context() as patch:
        for name in ("_open", "cp_file", "_rm", "pipe_file"):
            patch.setattr(MemoryFileSystem, name, change(getattr(MemoryFileSystem, name)))
        yield taken


@pytest.fixture
def run(toys: Any) -> Any:
    def run(output: Path, parts: dict[str, tuple[int, ...]], **options: Any) -> Any:
        return toys.run(output, [toys.part(*part) for part in parts.items()], CHAIN, batch_rows=2, **options)

    return run


def test_the_same_bytes_as_in_a_folder(run: Any, tmp_path: Path, memory: Path) -> None:
    for parts in (BEFORE, AFTER):  # the second takes over what did not change
        here, there = run(tmp_path / "out", parts), run(memory / "out", parts)
        assert (here.content_hash, here.fingerprint) == (there.content_hash, there.fingerprint)
        made, same = read_manifest(memory / "out"), read_manifest(tmp_path / "out")
        assert (made.shards, made.dropped, made.steps) == (same.shards, same.dropped, same.steps)
        assert {*file_names(memory / "out")} == {*file_names(tmp_path / "out"), STAMPS_NAME}
        for name in {*file_names(tmp_path / "out")} - {"_manifest.json", "_lineage.ndjson"}:
            assert (memory / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
        assert orpo_data.verify(memory / "out").ok
        assert not run(memory / "out", parts).ran
    assert sorted(path.name for path in memory.iterdir()) == [".out.notes", "out"]
    assert list((cache_folder() / "scratch").iterdir()) == []


@pytest.mark.slow
def test_an_s3_server(run: Any, tmp_path: Path, s3: Path) -> None:
    """A real one: what came before is taken over inside it, what a lost client left is finished, nothing is left."""
    run(tmp_path / "out", AFTER)
    run(s3 / "out", BEFORE)
    run(s3 / "out", AFTER)
    shutil.rmtree(cache_folder() / "files")  # another machine
    assert orpo_data.verify(s3 / "out").ok
    assert read_manifest(s3 / "out").shards == read_manifest(tmp_path / "out").shards
    assert orpo_data.load(str(s3 / "out")).to_list() == orpo_data.load(tmp_path / "out").to_list()
    assert not run(s3 / "out", AFTER).ran
    for name in [MANIFEST_NAME, *file_names(s3 / "out")]:  # lost while it moved: all of it lies beside its place
        copy(s3 / "out" / name, s3 / ".out.partial" / name)
    (s3 / "out" / MANIFEST_NAME).unlink()
    assert not run(s3 / "out", AFTER).ran
    assert orpo_data.verify(s3 / "out").ok
    assert sorted(path.name for path in s3.iterdir()) == [".out.notes", "out"]


def test_it_opens_as_any_dataset(run: Any, memory: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", AFTER)
    run(memory / "out", AFTER)
    url = str(memory / "out")
    assert orpo_data.load(url).to_list() == orpo_data.load(tmp_path / "out").to_list()
    assert orpo_data.scan(url).collect().equals(orpo_data.scan(tmp_path / "out").collect())
    assert orpo_data.load(url, "dropped").to_list() == orpo_data.load(tmp_path / "out", "dropped").to_list()


def test_processes_that_want_a_folder_at_a_time_fetch_it_once(run: Any, memory: Path) -> None:
    """Threads stand for them: the lock is taken anew by each."""
    run(memory / "set", BEFORE)
    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            fetched = [pool.submit(fetch_folder, memory / "set") for _ in range(4)]
        (here,) = {each.result() for each in fetched}
        assert sorted(file_names(here)) == sorted(file_names(memory / "set"))
        shutil.rmtree(here)


def test_damage_is_seen_though_the_cache_has_the_right_bytes(run: Any, memory: Path) -> None:
    run(memory / "out", AFTER)
    shard = memory / "out" / read_manifest(memory / "out").shards[0].path
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(bytes(content))
    assert [problem.partition(": ")[2] for problem in orpo_data.verify(memory / "out").problems] == [
        "its bytes changed (sha256 differs from the manifest)"
    ]
    shard.write_bytes(bytes(content[:-8]))
    with pytest.raises(OrpoError, match="the manifest says"):
        orpo_data.load(memory / "out")


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_whenever_the_storage_goes_away(
    run: Any, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Nothing opens there but the dataset before or the one after; the next run ends in the bytes of a fresh one."""
    run(tmp_path / "fresh", AFTER)
    fresh = read_manifest(tmp_path / "fresh")
    run(memory / "out", BEFORE)
    store, before = dict(MemoryFileSystem.store), read_manifest(memory / "out")
    with going_away(monkeypatch, None) as changes:
        run(memory / "out", AFTER)
    assert len(changes) > 30
    absent = 0
    for after in sorted({*range(0, len(changes), every), *range(len(changes) - 9, len(changes))}):
        MemoryFileSystem.store.clear()
        MemoryFileSystem.store.update(store)
        with going_away(monkeypatch, after), pytest.raises(GoneError):
            run(memory / "out", AFTER)
        try:
            found = read_manifest(memory / "out")
        except OrpoError:
            absent += 1
        else:
            assert found.content_hash in (before.content_hash, fresh.content_hash)
            assert orpo_data.verify(memory / "out").ok
        run(memory / "out", AFTER)
        made = read_manifest(memory / "out")
        assert (made.content_hash, made.steps) == (fresh.content_hash, fresh.steps), after
        assert made.files[PARTS_NAME] == fresh.files[PARTS_NAME]
        assert orpo_data.verify(memory / "out").ok
        assert sorted(path.name for path in memory.iterdir()) == [".out.notes", "out"], after
    assert absent


def test_a_folder_that_was_uploaded_is_built_on(run: Any, memory: Path, tmp_path: Path) -> None:
    """It has no record of what the storage says of its files, so their bytes are read."""
    run(tmp_path / "out", BEFORE)
    for name in file_names(tmp_path / "out"):
        send(tmp_path / "out" / name, memory / "out" / name)
    assert not run(memory / "out", BEFORE).ran
    report = run(memory / "out", AFTER)
    assert report.content_hash == run(tmp_path / "out", AFTER).content_hash
    assert orpo_data.verify(memory / "out").ok


def test_parts_are_taken_over_without_reading_them(run: Any, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage's own checksums say that they are what they were; where they say otherwise, the bytes decide."""
    run(memory / "out", BEFORE)
    manifest = read_manifest(memory / "out")
    hashed: list[str] = []

    def count(file: Path) -> str:
        hashed.append(file.name)
        return file_sha256(file)

    monkeypatch.setattr("orpo_data.reuse.file_sha256", count)
    earlier = Earlier(memory / "out")
    assert all(earlier.part(key) for key in earlier._parts)
    assert hashed == [PARTS_NAME]
    shard = memory / "out" / manifest.shards[0].path
    shard.write_bytes(shard.read_bytes())  # to the storage it is another file now
    assert all(earlier.part(key) for key in earlier._parts)
    assert hashed == [PARTS_NAME, shard.name]
