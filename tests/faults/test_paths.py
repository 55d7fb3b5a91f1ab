"""Paths: what manifests, folders and recipes name lies in its own folder, for reading as for writing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orpo_data
from orpo_data import places
from orpo_data.errors import OrpoError, UsageError
from orpo_data.locking import writing
from orpo_data.manifest import MANIFEST_NAME, digest
from orpo_data.sources.files import find_files
from pipelines import stages
from pipelines.recipe import Recipe

OUTSIDE = ["../secret.arrow", "/etc/passwd", "train/../../secret.arrow", "..", "", "a\\..\\b", "a\0b"]


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared / "split", tmp_path / "split"))


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("place", ["shards", "dropped", "files"])
def test_a_manifest_names_nothing_outside(folder: Path, place: str, path: str) -> None:
    """Even one whose checksum fits: its folder may have come from anywhere."""
    document = json.loads((folder / MANIFEST_NAME).read_text())
    del document["checksum"]
    shutil.copyfile(folder / document["shards"][0]["path"], folder.parent / "secret.arrow")
    if place == "files":
        document["files"][path] = "0" * 64
    else:
        document[place][0]["path"] = path
    (folder / MANIFEST_NAME).write_text(json.dumps(document | {"checksum": digest(document)}))
    assert "does not lie in the folder" in orpo_data.verify(folder).problems[0]
    for opens in (orpo_data.load, orpo_data.scan, lambda folder: orpo_data.push(folder, f"{folder}-pushed")):
        with pytest.raises(OrpoError, match="does not lie in the folder"):
            opens(folder)


def test_a_data_file_that_is_a_link_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").symlink_to(tmp_path / "secret.jsonl")
    for path in ("data", "data/*.jsonl"):
        with pytest.raises(OrpoError, match=r"data/a\.jsonl: is a link out of its folder, to .*secret\.jsonl"):
            find_files(str(tmp_path / path))
    (tmp_path / "data/b.jsonl").write_text("{}\n")
    (tmp_path / "data/a.jsonl").unlink()
    (tmp_path / "data/c.jsonl").symlink_to(tmp_path / "data/b.jsonl")
    (tmp_path / "named").symlink_to(tmp_path / "data")
    assert [file.name for file in find_files(str(tmp_path / "named"))] == ["b.jsonl", "c.jsonl"]


def test_a_data_folder_that_is_a_link_out_of_its_folder(tmp_path: Path) -> None:
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("{}\n")
    (tmp_path / "data/more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OrpoError, match=r"data/more: is a link out of its folder, to .*elsewhere"):
        find_files(str(tmp_path / "data"))


@pytest.mark.parametrize("pattern", ["../*.jsonl", "/etc/*", "**/../../*.jsonl"])
def test_a_pattern_that_climbs_out_finds_nothing(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "data").mkdir()
    for name in ("secret.jsonl", "data/a.jsonl"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(OrpoError, match="no file matches"):
        find_files(str(tmp_path / "data"), pattern=pattern)


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "..", ".hidden", "a\\b"])
def test_names_that_become_folders(make_recipe: Callable[..., Recipe], name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        make_recipe(f"name={json.dumps(name)}")
    with pytest.raises(UsageError, match="name"):
        make_recipe(f"sources.0.name={json.dumps(name)}")


def test_links_laid_where_a_stage_will_write(prepared: Path, make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """A shared folder: another user has put links to the victim's files where this run works."""
    victim = tmp_path / "victim"
    shutil.copytree(prepared / "clean", victim)
    (victim / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()}
    for name in (".out.partial", ".out.stale", ".out.notes"):
        (tmp_path / name).symlink_to(victim)
    stages.split(prepared / "clean", make_recipe(), tmp_path / "out")
    assert orpo_data.verify(tmp_path / "out").ok
    assert {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()} == before


def test_a_lock_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), writing(tmp_path / "out"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_folder_that_is_a_link_is_removed_as_one(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / MANIFEST_NAME).write_text("{}")
    os.symlink(tmp_path / "victim", tmp_path / "link")
    places.remove_folder(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "victim" / MANIFEST_NAME).exists()
