"""Output folders: complete or absent, and never in the place of what somebody else put there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orpo_data
from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, read_manifest
from orpo_data.places import file_names, make_folder

PAGES = {"README.md", "report.html", "_lineage.ndjson", "_manifest.json", "_parts.json"}
BY_DATASETS = ["dataset_info.json", "state.json"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {name: (folder / name).read_bytes() for name in sorted(file_names(folder))}


@pytest.fixture
def write(toys: Any) -> Callable[..., Any]:
    """Writes the odd numbers up to 20 as a dataset folder; the source may break off before a row."""

    def write(output: Path, version: str = "1", breaks: int | None = None) -> Any:
        part = toys.part(f"numbers-{version}", tuple(range(21)), breaks=breaks)
        return toys.run(output, [part], [("without", 2)], batch_rows=5)

    return write


@pytest.mark.parametrize("stage", ["ingest/hh-rlhf", "binarize", "clean"])
def test_the_files_of_a_folder_and_nothing_beside_it(prepared: Path, stage: str) -> None:
    manifest = read_manifest(prepared / stage)
    folders = [("", len(manifest.shards)), ("dropped/", len(manifest.dropped))]
    assert contents(prepared / stage).keys() == PAGES | {
        f"{folder}{name}" for folder, shards in folders for name in [*BY_DATASETS, *names(shards)]
    }


def names(shards: int) -> list[str]:
    return [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]


@pytest.mark.parametrize("stage", ["split", "tokenize"])
def test_the_files_of_a_split_folder(prepared: Path, stage: str) -> None:
    """One shard for each of the two parts on each side."""
    folders = [("train/", 2), ("eval/", 2), ("dropped/", 1)]
    assert contents(prepared / stage).keys() == PAGES | {"dataset_dict.json"} | {
        f"{folder}{name}" for folder, shards in folders for name in [*BY_DATASETS, *names(shards)]
    }


# --- complete or absent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["notes.txt", "sub/notes.txt"])
def test_a_foreign_folder_is_refused_and_left_alone(anywhere: Path, write: Callable[..., Any], held: str) -> None:
    make_folder((anywhere / "out" / held).parent)
    (anywhere / "out" / held).write_text("mine")
    with pytest.raises(OrpoError, match=r"out: holds something else"):
        write(anywhere / "out")
    assert contents(anywhere) == {f"out/{held}": b"mine"}


def test_a_file_in_the_way_is_left_alone(anywhere: Path, write: Callable[..., Any]) -> None:
    (anywhere / "out").write_text("mine")
    with pytest.raises(OrpoError, match=r"out: is a file"):
        write(anywhere / "out")
    assert contents(anywhere) == {"out": b"mine"}


def test_another_tools_manifest_does_not_make_a_folder_ours(anywhere: Path, write: Callable[..., Any]) -> None:
    make_folder(anywhere / "out")
    (anywhere / "out" / MANIFEST_NAME).write_text('{"files": ["thesis.tex"]}')
    (anywhere / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(OrpoError, match=r"out: "):
        write(anywhere / "out")
    assert (anywhere / "out" / "thesis.tex").read_text() == "mine"


def test_files_put_into_our_folder_are_not_deleted(anywhere: Path, write: Callable[..., Any]) -> None:
    write(anywhere / "out")
    (anywhere / "out" / "thesis.tex").write_text("mine")
    before = contents(anywhere)
    with pytest.raises(OrpoError, match=r"thesis\.tex"):
        write(anywhere / "out", version="2")
    assert contents(anywhere) == before


def test_a_folder_that_is_a_link_is_refused_before_the_work(tmp_path: Path, write: Callable[..., Any]) -> None:
    """The new folder would take the link's place, and lie on the disk that the link was to spare."""
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")
    with pytest.raises(OrpoError, match="is a link or a mount point"):
        write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()


def test_an_empty_folder_is_filled(tmp_path: Path, write: Callable[..., Any]) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert orpo_data.verify(tmp_path / "out").ok


def test_a_failure_midway_leaves_nothing(anywhere: Path, write: Callable[..., Any]) -> None:
    with pytest.raises(OrpoError, match="broke off"):
        write(anywhere / "out", breaks=10)
    assert file_names(anywhere) == []


def test_a_failure_midway_leaves_the_old_folder(anywhere: Path, write: Callable[..., Any]) -> None:
    write(anywhere / "out")
    before = contents(anywhere)
    with pytest.raises(OrpoError, match="broke off"):
        write(anywhere / "out", version="2", breaks=10)
    assert contents(anywhere) == before


def test_a_failure_while_moving_leaves_the_old_folder(
    tmp_path: Path, write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses the second of the two renames."""
    write(tmp_path / "out")
    before, rename = contents(tmp_path), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError("no")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="no"):
            write(tmp_path / "out", version="2")
    assert contents(tmp_path) == before


def test_a_run_killed_while_moving_does_not_cost_the_old_folder(tmp_path: Path, write: Callable[..., Any]) -> None:
    """Between the two renames it lies aside; the next run, though it fails, puts it back first."""
    write(tmp_path / "out")
    before = contents(tmp_path)
    (tmp_path / "out").rename(tmp_path / ".out.stale")
    with pytest.raises(OrpoError, match="broke off"):
        write(tmp_path / "out", version="2", breaks=10)
    assert contents(tmp_path) == before
