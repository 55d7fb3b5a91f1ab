"""Dataset folders, opened: everywhere with the same rows, memory-mapped, the manifest checked."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

import orpo_data
from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from orpo_data.places import file_sha256
from orpo_data.shards import read_table


@pytest.mark.parametrize("stage", ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean"])
def test_a_whole_dataset_opens_everywhere_with_the_same_rows(prepared: Path, stage: str) -> None:
    folder = prepared / stage
    rows = read_table(folder).to_pylist()
    assert len(rows) == read_manifest(folder).rows > 0
    assert datasets.load_from_disk(str(folder)).to_list() == rows
    assert orpo_data.load(folder).to_list() == rows
    assert orpo_data.scan(folder).collect().to_dicts() == rows
    assert (
        orpo_data.load(str(folder), split="dropped").to_list()
        == datasets.load_from_disk(str(folder / "dropped")).to_list()
    )
    assert orpo_data.scan(folder, split="dropped").collect().to_dicts() == orpo_data.load(folder, "dropped").to_list()


@pytest.mark.parametrize("stage", ["split", "tokenize"])
def test_a_split_dataset_opens_everywhere_with_the_same_rows(prepared: Path, stage: str) -> None:
    folder = prepared / stage
    opened = datasets.load_from_disk(str(folder))
    assert list(opened) == ["train", "eval"]
    for split in opened:
        rows = read_table(folder, split).to_pylist()
        assert len(rows) > 0
        assert opened[split].to_list() == orpo_data.load(folder, split).to_list() == rows
        assert orpo_data.scan(folder, split).collect().to_dicts() == rows
    assert orpo_data.scan(folder).collect().height == sum(len(opened[split]) for split in opened)


def test_several_shards_open_as_one(small_shards: None, tmp_path: Path, toys: Any) -> None:
    toys.run(tmp_path / "clean", [toys.part("a", tuple(range(21)))], [("without", 2)])
    assert len(read_manifest(tmp_path / "clean").shards) == len(read_manifest(tmp_path / "clean").dropped) == 2
    expected = [i for i in range(21) if i % 2]
    assert orpo_data.load(tmp_path / "clean")["source_row"][:] == expected
    assert datasets.load_from_disk(str(tmp_path / "clean"))["source_row"][:] == expected
    assert orpo_data.scan(tmp_path / "clean").collect()["source_row"].to_list() == expected
    assert orpo_data.load(tmp_path / "clean", "dropped")["source_row"][:] == [i for i in range(21) if i % 2 == 0]


def test_rows_are_mapped_not_read(prepared: Path) -> None:
    before = pa.total_allocated_bytes()
    table = read_table(prepared / "clean")
    assert table.nbytes > 10_000
    assert pa.total_allocated_bytes() - before < 1_000


def test_a_shard_of_this_process_is_hashed_again_only_when_it_changes(
    tmp_path: Path, toys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    monkeypatch.setattr("orpo_data.shards.file_sha256", lambda file: hashed.append(file) or file_sha256(file))
    toys.run(tmp_path / "clean", [toys.part("a", (1, 2, 3))], [("without", 2)])
    assert len(read_table(tmp_path / "clean")) == 2
    assert hashed == []
    shard = tmp_path / "clean/data-00000-of-00001.arrow"
    before, content = shard.stat(), bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OrpoError, match="its bytes changed since it was written"):
        read_table(tmp_path / "clean")
    assert hashed == [shard]


def test_a_shard_that_changes_while_it_is_hashed_is_not_sound(
    tmp_path: Path, toys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys.run(tmp_path / "clean", [toys.part("a", (1, 2, 3))], [("without", 2)])
    shard = tmp_path / "clean/data-00000-of-00001.arrow"
    os.utime(shard, ns=(1, 1))  # no longer the file that this process wrote

    def changed_meanwhile(file: Path) -> str:
        found = file_sha256(file)
        shard.write_bytes(shard.read_bytes()[:-100] + bytes(100))
        return found

    monkeypatch.setattr("orpo_data.shards.file_sha256", changed_meanwhile)
    with pytest.raises(OrpoError, match="its bytes changed since it was written"):
        read_table(tmp_path / "clean")


@pytest.mark.parametrize("opener", [orpo_data.load, orpo_data.scan])
def test_an_unknown_split(prepared: Path, opener: Callable[..., Any]) -> None:
    with pytest.raises(OrpoError, match=r"^no split 'test' in this split dataset, it has \['train', 'eval'\]$"):
        opener(prepared / "split", "test")
    with pytest.raises(OrpoError, match=r"^no split 'eval' in this clean dataset, it has \['train'\]$"):
        opener(prepared / "clean", "eval")


def test_what_is_no_dataset_folder(tmp_path: Path) -> None:
    with pytest.raises(OrpoError, match="not a dataset folder"):
        orpo_data.load(tmp_path)
    with pytest.raises(OrpoError, match="not a dataset folder"):
        orpo_data.scan(tmp_path / "absent")
