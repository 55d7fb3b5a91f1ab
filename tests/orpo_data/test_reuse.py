"""What an earlier run left is taken over if every byte of it is sound, and never taken on trust."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo_data.cache import cache_folder
from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, digest, read_manifest
from orpo_data.places import is_local
from orpo_data.reuse import PARTS_NAME, Earlier, NoteCache

CHAIN = [("without", 3), ("first", 4), ("shift", 4)]
"""Two global steps, and dropped rows."""


@pytest.fixture
def parts(toys: Any) -> list[Any]:
    return [toys.part("a", (1, 2, 3, 4)), toys.part("b", (3, 5, 7)), toys.part("c", (8, 9, 10, 21, 14))]


@pytest.fixture
def rerun(toys: Any, parts: list[Any], anywhere: Path) -> Callable[..., list[str]]:
    """Run the stage anew into a folder that an earlier run, of one part less, wrote, with `damage` done to it in
    between; the bytes must be those of a fresh run. Returns the parts that were read."""

    def rerun(damage: Callable[[Path], None] = lambda output: None, chain: Any = CHAIN) -> list[str]:
        (anywhere / "fresh").mkdir()
        toys.run(anywhere / "fresh/out", parts, CHAIN, batch_rows=2)
        toys.run(anywhere / "out", parts[:2], chain, batch_rows=2)
        damage(anywhere / "out")
        if not is_local(anywhere):
            shutil.rmtree(cache_folder() / "files")  # as on another machine, which has not kept what it sent there
        toys.forget()
        toys.run(anywhere / "out", parts, CHAIN, batch_rows=2)
        fresh, made = read_manifest(anywhere / "fresh/out"), read_manifest(anywhere / "out")
        assert (made.shards, made.dropped, made.steps) == (fresh.shards, fresh.dropped, fresh.steps)
        assert made.files[PARTS_NAME] == fresh.files[PARTS_NAME]
        for shard in (*made.shards, *made.dropped):
            assert (anywhere / "out" / shard.path).read_bytes() == (anywhere / "fresh/out" / shard.path).read_bytes()
        assert {note.name for note in notes(anywhere / "out")} == {note.name for note in notes(anywhere / "fresh/out")}
        return sorted(set(toys.read))

    return rerun


def notes(output: Path) -> list[Path]:
    return sorted((output.parent / f".{output.name}.notes").iterdir())


def flip(file: Path) -> None:
    """Other bytes of the same size."""
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def test_what_is_sound_is_taken_over(rerun: Callable[..., Any]) -> None:
    assert rerun() == ["c"]


def flip_shard(output: Path) -> None:
    flip(output / read_manifest(output).shards[0].path)


def flip_dropped(output: Path) -> None:
    flip(output / read_manifest(output).dropped[0].path)


def flip_notes(output: Path) -> None:
    for file in notes(output):
        flip(file)


def cut_notes(output: Path) -> None:
    for file in notes(output):
        file.write_bytes(file.read_bytes()[:100])


def remove_shard(output: Path) -> None:
    (output / read_manifest(output).shards[0].path).unlink()


def alter_records(output: Path) -> None:
    records = json.loads((output / PARTS_NAME).read_text())
    records[0]["shards"] = records[1]["shards"]
    (output / PARTS_NAME).write_text(json.dumps(records))


def alter_manifest(output: Path) -> None:
    text = (output / MANIFEST_NAME).read_text()
    (output / MANIFEST_NAME).write_text(text.replace('"rows_in": 7', '"rows_in": 8'))


@pytest.mark.parametrize(
    ("damage", "read"),
    [
        (flip_shard, ["a", "c"]),
        (remove_shard, ["a", "c"]),
        (flip_dropped, ["a", "b", "c"]),
        (flip_notes, ["a", "b", "c"]),
        (cut_notes, ["a", "b", "c"]),
        (alter_records, ["a", "b", "c"]),
        (alter_manifest, ["a", "b", "c"]),
    ],
)
def test_what_is_damaged_is_worked_out_anew(
    rerun: Callable[..., Any], damage: Callable[[Path], None], read: list[str]
) -> None:
    assert rerun(damage) == read


@pytest.mark.parametrize(
    "chain",
    [
        [("without", 2), *CHAIN[1:]],
        [CHAIN[0], ("first", 3), CHAIN[2]],
        [*CHAIN[:2], ("shift", 3)],
        [*CHAIN, ("without", 9)],
        [CHAIN[0], ("without", 9), *CHAIN[1:]],
        CHAIN[:1],
        [],
    ],
)
def test_what_came_of_other_steps_is_not_taken_over(rerun: Callable[..., Any], chain: Any) -> None:
    assert rerun(chain=chain) == ["a", "b", "c"]


def test_notes_of_other_steps_are_removed(
    rerun: Callable[..., Any], toys: Any, parts: list[Any], anywhere: Path
) -> None:
    """`rerun` sees that none are left; the folder goes with the last."""
    assert rerun(chain=[("first", 3), ("shift", 3)]) == ["a", "b", "c"]
    toys.run(anywhere / "out", parts, [("without", 3)])
    assert sorted(path.name for path in anywhere.iterdir()) == ["fresh", "out"]


def test_what_is_no_note_stays(toys: Any, parts: list[Any], tmp_path: Path) -> None:
    (tmp_path / ".out.notes/mine").mkdir(parents=True)
    (tmp_path / ".out.notes/thesis.arrow").write_text("mine")
    for chain in (CHAIN, [("without", 3)]):
        toys.run(tmp_path / "out", parts, chain)
    assert [path.name for path in notes(tmp_path / "out")] == ["mine", "thesis.arrow"]


def test_notes_outlive_a_run_that_fails(toys: Any, parts: list[Any], tmp_path: Path) -> None:
    """They are complete, and the next run has no need to take them again."""

    def refuse(folder: Path, manifest: Any) -> dict[str, Any]:
        raise OrpoError("refused")

    with pytest.raises(OrpoError, match="refused"):
        toys.run(tmp_path / "out", parts, CHAIN, review=refuse)
    assert [path.name for path in tmp_path.iterdir()] == [".out.notes"]
    kept = notes(tmp_path / "out")
    toys.forget()
    toys.run(tmp_path / "out", parts, CHAIN)
    assert toys.read == ["a", "b", "c"]  # to make the rows: for notes alone they would be read once more
    assert notes(tmp_path / "out") == kept


def test_a_shard_is_linked_where_the_file_system_can(
    toys: Any, parts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys.run(tmp_path / "out", parts[:1], CHAIN[:1])
    first = (tmp_path / "out/data-00000-of-00001.arrow").stat()
    toys.run(tmp_path / "out", parts[:2], CHAIN[:1])
    linked = (tmp_path / "out/data-00000-of-00002.arrow").stat()
    assert (linked.st_ino, linked.st_nlink) == (first.st_ino, 1)

    def refuse(*paths: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    toys.run(tmp_path / "out", parts, CHAIN[:1])
    copied = tmp_path / "out/data-00000-of-00003.arrow"
    assert (copied.stat().st_ino, copied.stat().st_size) != (first.st_ino, 0)
    assert copied.stat().st_size == first.st_size
    assert read_manifest(tmp_path / "out").rows == 8


def test_a_folder_without_records_is_nothing_to_build_on(toys: Any, parts: list[Any], tmp_path: Path) -> None:
    assert Earlier(tmp_path / "absent").part("key") is None
    toys.run(tmp_path / "out", parts, CHAIN)
    assert Earlier(tmp_path / "out").part("key") is None
    (tmp_path / "out" / PARTS_NAME).unlink()
    assert Earlier(tmp_path / "out")._parts == {}


def test_notes_are_found_by_all_they_depend_on(anywhere: Path) -> None:
    cache, (one, other) = NoteCache(anywhere / "out"), (digest("one"), digest("other"))
    assert cache.find(one) is None
    (anywhere / "new").write_bytes(b"notes")
    kept = cache.keep(one, anywhere / "new")
    assert not (anywhere / "new").exists()
    assert (NoteCache(anywhere / "out").find(one), NoteCache(anywhere / "out").find(other)) == (kept, None)
