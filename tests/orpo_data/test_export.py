"""JSON lines for other trainers: all rows, whole files or none, one clear line for what cannot be exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
import yaml

import orpo_data
from orpo_data.errors import OrpoError, UsageError
from orpo_data.export import export
from orpo_data.views import TEXT_VIEWS
from pipelines import stages

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

OPENAI_COLUMNS = {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("form", TEXT_VIEWS)
def test_what_was_exported_is_ingested_as_the_same_pairs(
    prepared: Path, tmp_path: Path, make_recipe: Callable[..., "Recipe"], form: str
) -> None:
    export(prepared / "split", form, tmp_path / "out" / "prefs.jsonl")
    columns = OPENAI_COLUMNS if form == "openai" else {}
    source = {"dataset": "pairs", "path": str(tmp_path / "out"), "files": "*.jsonl", "columns": columns}
    recipe = make_recipe(f"sources={yaml.safe_dump([source], default_flow_style=True)}")
    stages.ingest(recipe.sources[0], recipe, tmp_path / "again")
    again, before = (
        orpo_data.scan(folder).select("id").collect() for folder in (tmp_path / "again", prepared / "split")
    )
    assert again["id"].sort().to_list() == before["id"].sort().to_list()


def test_one_file_a_split_and_nothing_beside_them(prepared: Path, tmp_path: Path) -> None:
    files = export(prepared / "split", "trl", tmp_path / "prefs.jsonl")
    assert [(file.path.name, file.split) for file in files] == [
        ("prefs-train.jsonl", "train"),
        ("prefs-eval.jsonl", "eval"),
    ]
    assert files_in(tmp_path) == ["prefs-eval.jsonl", "prefs-train.jsonl"]
    for file in files:
        assert (
            len(file.path.read_text().splitlines()) == file.rows == len(orpo_data.load(prepared / "split", file.split))
        )


def test_one_file_where_there_are_no_splits(prepared: Path, tmp_path: Path) -> None:
    (file,) = export(prepared / "clean", "openai", tmp_path / "prefs.jsonl")
    assert (file.path, file.rows) == (tmp_path / "prefs.jsonl", len(orpo_data.load(prepared / "clean")))


@pytest.mark.parametrize("folder", ["new", "new/deeper", "there.v1"])
def test_a_folder_gets_files_called_after_the_form(prepared: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / "there.v1").mkdir()
    export(prepared / "split", "trl", tmp_path / folder)
    export(prepared / "clean", "axolotl", tmp_path / folder)
    assert files_in(tmp_path / folder) == ["axolotl.jsonl", "trl-eval.jsonl", "trl-train.jsonl"]


def test_an_empty_split_is_an_empty_file(make_recipe: Callable[..., "Recipe"], prepared: Path, tmp_path: Path) -> None:
    stages.split(prepared / "clean", make_recipe("split.eval_fraction=0.0"), tmp_path / "split")
    files = export(tmp_path / "split", "axolotl", tmp_path / "prefs.jsonl")
    assert [file.rows for file in files] == [len(orpo_data.load(prepared / "clean")), 0]
    assert (tmp_path / "prefs-eval.jsonl").read_text() == ""


def test_an_export_again_takes_the_place_of_the_one_before(prepared: Path, tmp_path: Path) -> None:
    export(prepared / "clean", "trl", tmp_path / "prefs.jsonl")
    before = (tmp_path / "prefs.jsonl").read_bytes()
    (tmp_path / "prefs.jsonl").write_text("old")
    export(prepared / "clean", "trl", tmp_path / "prefs.jsonl")
    assert (tmp_path / "prefs.jsonl").read_bytes() == before


def test_a_failure_midway_leaves_the_old_files(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prefs-train.jsonl").write_text("old")
    sink, calls = pl.LazyFrame.sink_ndjson, []

    def fails_the_second_time(frame: pl.LazyFrame, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError("No space left on device")
        sink(frame, path)

    monkeypatch.setattr(pl.LazyFrame, "sink_ndjson", fails_the_second_time)
    with pytest.raises(OSError, match="No space left"):
        export(prepared / "split", "trl", tmp_path / "prefs.jsonl")
    assert files_in(tmp_path) == ["prefs-train.jsonl"]
    assert (tmp_path / "prefs-train.jsonl").read_text() == "old"


# --- LLaMA-Factory's dataset_info.json --------------------------------------------------------------------------------


def test_dataset_info_names_the_files_and_keeps_what_others_entered(prepared: Path, tmp_path: Path) -> None:
    place = tmp_path / "dataset_info.json"
    place.write_text(
        json.dumps({"identity": {"file_name": "identity.json"}, "prefs-train": {"file_name": "older.json"}})
    )
    export(prepared / "split", "llama-factory", tmp_path / "prefs.jsonl")
    info = json.loads(place.read_text())
    assert list(info) == ["identity", "prefs-train", "prefs-eval"]
    assert info["identity"] == {"file_name": "identity.json"}
    assert info["prefs-train"] == {
        "file_name": "prefs-train.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"},
    }
    first = json.loads((tmp_path / "prefs-train.jsonl").read_text().splitlines()[0])
    assert set(info["prefs-train"]["columns"].values()) == set(first)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_dataset_info_that_is_none_stays_and_nothing_is_written(prepared: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(OrpoError, match=r"dataset_info\.json: is no JSON"):
        export(prepared / "split", "llama-factory", tmp_path / "prefs.jsonl")
    assert files_in(tmp_path) == ["dataset_info.json"]
    assert (tmp_path / "dataset_info.json").read_text() == content


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("tokenize", r"tokenize: holds token ids, an export takes cleaned text; give the folder of clean or split$"),
        ("binarize", r"binarize: is the output of binarize, an export takes cleaned text; give the folder"),
        ("ingest/ultrafeedback", r"ultrafeedback: is the output of ingest, an export takes cleaned text"),
    ],
)
def test_datasets_without_cleaned_text(prepared: Path, tmp_path: Path, stage: str, line: str) -> None:
    with pytest.raises(OrpoError, match=line):
        export(prepared / stage, "trl", tmp_path / "prefs.jsonl")
    assert files_in(tmp_path) == []


def test_an_unknown_form(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^--to 'alpaca': unknown form, there are axolotl, llama-factory, openai, trl$"
    ):
        export(prepared / "clean", "alpaca", tmp_path / "prefs.jsonl")


@pytest.mark.parametrize("name", ["prefs.jsonl.gz", "prefs.parquet"])
def test_a_file_of_another_format(prepared: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}: give a folder, or a file of JSON lines: .*\.jsonl$"):
        export(prepared / "clean", "trl", tmp_path / name)
    assert files_in(tmp_path) == []


def test_a_dataset_with_a_shard_missing(prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared / "clean", tmp_path / "clean"))
    next(folder.glob("*.arrow")).unlink()
    with pytest.raises(OrpoError, match="is missing"):
        export(folder, "trl", tmp_path / "prefs.jsonl")
    assert files_in(tmp_path) == ["clean"]
