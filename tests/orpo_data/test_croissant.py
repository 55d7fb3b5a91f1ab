"""The Croissant file: mlcroissant finds nothing wrong with it, and reads the very rows through it."""

import json
from datetime import date
from typing import Any

import pyarrow.parquet as pq
import pytest

import orpo_data
from orpo_data.croissant import CROISSANT_NAME, croissant
from orpo_data.manifest import read_manifest
from orpo_data.pages.upstream import SourceOfRows
from orpo_data.parquet import write_parquet
from orpo_data.places import file_sha256
from orpo_data.publish import push
from orpo_data.schema import PAIRS
from orpo_data.shards import read_table

mlcroissant = pytest.importorskip("mlcroissant", reason="needs mlcroissant (extra `dev`)")

SPLITS = {"ingest/ultrafeedback": ["train"], "clean": ["train"], "split": ["train", "eval"], "tokenize": ["train"]}


@pytest.fixture(scope="module")
def pushed(prepared, tmp_path_factory):
    """Every kind of dataset, pushed into a folder."""
    root = tmp_path_factory.mktemp("pushed")
    for stage in SPLITS:
        push(prepared / stage, str(root / stage), published=date(2024, 3, 12))
    return root


def plain(value: Any) -> Any:
    """Values as mlcroissant reads them, as those that were written: text for bytes, members by their last name."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name.rsplit("/", 1)[-1]: plain(item) for name, item in value.items()}
    return value


@pytest.mark.parametrize("stage", SPLITS)
def test_mlcroissant_finds_nothing_wrong(pushed, stage):
    issues = mlcroissant.Dataset(jsonld=pushed / stage / CROISSANT_NAME).metadata.issues
    assert issues.report() == ""


@pytest.mark.parametrize(("stage", "split"), [(stage, split) for stage, splits in SPLITS.items() for split in splits])
def test_mlcroissant_reads_the_rows(pushed, prepared, stage, split):
    dataset = mlcroissant.Dataset(jsonld=pushed / stage / CROISSANT_NAME)
    found = [plain(record) for record in dataset.records(split)]
    rows = read_table(prepared / stage, split).to_pylist()
    assert len(found) == len(rows) > 0
    for record, row in zip(found, rows, strict=True):
        assert record == row


def test_what_it_says(pushed, prepared):
    document = json.loads((pushed / "split" / CROISSANT_NAME).read_text())
    manifest = read_manifest(prepared / "split")
    assert document["name"] == "test-split"
    assert document["version"] == f"1.0.0+{manifest.content_hash[:16]}"
    assert document["license"] == ["https://spdx.org/licenses/MIT.html"]
    assert document["datePublished"] == "2024-03-12"
    for file in document["distribution"]:
        assert file["sha256"] == file_sha256(pushed / "split" / file["contentUrl"])
        assert file["contentSize"] == f"{(pushed / 'split' / file['contentUrl']).stat().st_size} B"
    assert [record_set["@id"] for record_set in document["recordSet"]] == ["train", "eval"]
    fields = {field["name"]: field for field in document["recordSet"][0]["field"]}
    assert "as a list of one assistant message" in fields["train/chosen"]["description"]


def test_a_licence_that_nobody_stated_is_not_made_up(prepared, tmp_path):
    manifest = read_manifest(prepared / "clean")
    files = write_parquet(prepared / "clean", manifest, tmp_path)
    sources = [SourceOfRows("own", "pairs", "x.jsonl", None), SourceOfRows("hh", "hh-rlhf", "x", None)]
    assert "license" not in croissant(manifest, files, sources, "url", date(2024, 1, 1))
    assert "license" in croissant(manifest, files, sources[1:], "url", date(2024, 1, 1))


def test_parquet_holds_the_same_table(tmp_path, prepared):
    manifest = read_manifest(prepared / "split")
    files = write_parquet(prepared / "split", manifest, tmp_path)
    assert [(file.path, file.split) for file in files] == [
        ("parquet/train.parquet", "train"),
        ("parquet/eval.parquet", "eval"),
    ]
    for file in files:
        table = pq.read_table(tmp_path / file.path)
        assert table.equals(read_table(prepared / "split", file.split))
        assert len(table) == file.rows


def test_the_same_rows_give_the_same_parquet_bytes(tmp_path, prepared):
    manifest = read_manifest(prepared / "split")
    one, two = (write_parquet(prepared / "split", manifest, tmp_path / name) for name in ("one", "two"))
    assert [file.sha256 for file in one] == [file.sha256 for file in two]


def test_an_empty_split_is_an_empty_file(tmp_path, write_dataset, plain_pair):
    write_dataset(tmp_path / "d", PAIRS, {"train": [plain_pair()], "eval": []})
    files = write_parquet(tmp_path / "d", read_manifest(tmp_path / "d"), tmp_path / "out")
    assert [file.rows for file in files] == [1, 0]
    assert pq.read_table(tmp_path / "out" / "parquet" / "eval.parquet").schema.names == PAIRS.names


def test_the_pushed_folder_is_a_dataset(pushed, prepared):
    for stage in SPLITS:
        assert orpo_data.verify(pushed / stage).ok
        assert read_manifest(pushed / stage).content_hash == read_manifest(prepared / stage).content_hash
