"""A stage runs when what it depends on changed, and says why; else it touches no row."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo_data.chat import find_template
from orpo_data.errors import OrpoError
from orpo_data.history import lineage
from orpo_data.manifest import read_manifest
from orpo_data.stage import StageReport
from orpo_data.steps.binarize import Binarize
from orpo_data.steps.clean import Clean
from orpo_data.steps.split import Split
from orpo_data.verification import verify
from pipelines import prepare, stages
from pipelines.checks import chat_of
from pipelines.recipe import Recipe

STAGES = ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"]


def content_hashes(output: Path) -> dict[str, str]:
    return {stage: read_manifest(output / stage).content_hash for stage in STAGES}


def modified(output: Path) -> dict[str, int]:
    """When each manifest was written."""
    return {stage: (output / stage / "_manifest.json").stat().st_mtime_ns for stage in STAGES}


def ran(reports: list[StageReport]) -> list[str]:
    return [report.stage for report in reports if report.ran]


def test_an_unchanged_run_touches_nothing(tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe]) -> None:
    shutil.copytree(prepared, tmp_path / "run", copy_function=shutil.copy2)
    before = modified(tmp_path / "run")
    reports = prepare(make_recipe(), tmp_path / "run")
    assert ran(reports) == []
    assert {report.why for report in reports} == {"unchanged"}
    assert modified(tmp_path / "run") == before


def test_where_things_lie_now_is_on_record_and_no_row_is_made_again(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe], raw_data: Path, chat_tokenizer_dir: Path
) -> None:
    """Raw files, tokenizer and outputs were moved, and the recipe has another name: the old places are gone."""
    shutil.copytree(prepared, tmp_path / "run")
    shutil.copytree(raw_data, tmp_path / "raw")
    (tmp_path / "raw/hh/train.jsonl").rename(tmp_path / "raw/hh/renamed.jsonl")
    shutil.copytree(chat_tokenizer_dir, tmp_path / "tokenizer")
    (tmp_path / "run/split").rename(tmp_path / "run/parted")
    moved = make_recipe("name=another", f"tokenize.tokenizer={tmp_path / 'tokenizer'}", raw=tmp_path / "raw")
    reports = [stages.split(tmp_path / "run/clean", moved, tmp_path / "run/parted")]
    reports.append(stages.tokenize(tmp_path / "run/parted", moved, tmp_path / "run/tokenize"))
    reports.append(stages.ingest(moved.sources[0], moved, tmp_path / "run/ingest" / moved.sources[0].label))
    assert {report.why for report in reports} == {"unchanged"}
    manifest = read_manifest(tmp_path / "run/tokenize")
    assert manifest.recipe == moved.resolved()
    assert [item.path for item in manifest.inputs] == ["../parted"]
    rest = read_manifest(prepared / "tokenize").model_copy(update={"inputs": [], "recipe": {}})
    assert manifest.model_copy(update={"inputs": [], "recipe": {}}) == rest
    assert chat_of(manifest).tokenizer
    assert lineage(tmp_path / "run/tokenize").nodes[0].manifest.stage == "ingest"
    ingested = read_manifest(reports[-1].path)
    assert [item.name for item in ingested.inputs] == [
        item.name for item in read_manifest(prepared / "ingest" / moved.sources[0].label).inputs
    ]  # as the rows have them
    assert verify(tmp_path / "run/tokenize").ok


def test_a_stage_made_again_with_other_bytes_runs_what_read_it(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe], raw_data: Path
) -> None:
    """A renamed file alone changes nothing, but its name is in the rows once they are read again."""
    shutil.copytree(prepared, tmp_path / "run")
    shutil.copytree(raw_data, tmp_path / "raw")
    (tmp_path / "raw/hh/train.jsonl").rename(tmp_path / "raw/hh/renamed.jsonl")
    shutil.rmtree(tmp_path / "run/ingest")
    recipe = make_recipe(raw=tmp_path / "raw")
    assert {"ingest", "binarize", "clean", "split"} <= {*ran(prepare(recipe, tmp_path / "run"))}
    prepare(recipe, tmp_path / "full")
    assert content_hashes(tmp_path / "run") == content_hashes(tmp_path / "full")


@pytest.mark.parametrize(
    ("override", "stages_run", "why"),
    [
        ("binarize.seed=43", ["binarize", "clean", "split", "tokenize"], "steps[0].config.seed: 42 -> 43"),
        ("sources.1.weight=0.5", ["binarize", "clean", "split", "tokenize"], "steps"),
        ("clean.ties=keep", ["clean", "split", "tokenize"], "steps[0].config.ties: drop -> off"),
        ("split.eval_fraction=0.4", ["split", "tokenize"], "steps[0].config.eval_fraction: 0.2 -> 0.4"),
        ("tokenize.max_length=150", ["tokenize"], "steps[2].config.max_length: 160 -> 150"),
        ("tokenize.chat_template=hh", ["tokenize"], "steps[0].config.chat: "),
        ("sources.0.name=talk", ["ingest", "binarize", "clean", "split", "tokenize"], "no output yet"),
        ("train.model=x", [], ""),
        ("evaluate.samples=1", [], ""),
    ],
)
def test_a_changed_setting_runs_what_depends_on_it(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe], override: str, stages_run: list[str], why: str
) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    reports = prepare(make_recipe(override), tmp_path / "run")
    assert ran(reports) == stages_run
    if stages_run:
        first, *others = [report for report in reports if report.ran]
        assert why in first.why
        assert all("inputs" in report.why for report in others)
    assert ran(prepare(make_recipe(override), tmp_path / "run")) == []


def test_going_back_gives_the_first_bytes_again(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe]
) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    prepare(make_recipe("binarize.seed=7"), tmp_path / "run")
    assert content_hashes(tmp_path / "run") != content_hashes(prepared)
    prepare(make_recipe(), tmp_path / "run")
    assert content_hashes(tmp_path / "run") == content_hashes(prepared)


def test_a_changed_byte_of_a_raw_file(tmp_path: Path, own_raw_data: Path, make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(raw=own_raw_data)
    prepare(recipe, tmp_path / "run")
    file = own_raw_data / "hh" / "train.jsonl"
    stat = file.stat()
    file.write_text(file.read_text().replace("No idea, number 5.", "No idea, number 6."))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    reports = prepare(recipe, tmp_path / "run")
    assert ran(reports) == ["ingest", "binarize", "clean", "split", "tokenize"]
    assert reports[0].why.startswith("changed: inputs[0]: ")
    assert not reports[1].ran


@pytest.mark.parametrize("step", [Binarize, Clean, Split])
def test_a_new_version_of_a_step(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, step: Any
) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    monkeypatch.setattr(step, "version", step.version + 1)
    reports = prepare(make_recipe(), tmp_path / "run")
    first = next(report for report in reports if report.ran)
    assert (first.stage, first.why) == (step.name, f"changed: steps[0].version: {step.version - 1} -> {step.version}")


def change_vocabulary(tokenizer: Path) -> None:
    document = json.loads((tokenizer / "tokenizer.json").read_text())
    document["model"]["merges"].pop()
    (tokenizer / "tokenizer.json").write_text(json.dumps(document))


def change_template(tokenizer: Path) -> None:
    (tokenizer / "chat_template.jinja").write_text(find_template("chatml").replace("'\\n'", "'\\n\\n'"))


@pytest.mark.parametrize("change", [change_vocabulary, change_template])
def test_a_tokenizer_changed_in_place(
    tmp_path: Path,
    prepared: Path,
    make_recipe: Callable[..., Recipe],
    chat_tokenizer_dir: Path,
    change: Callable[[Path], None],
) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    shutil.copytree(chat_tokenizer_dir, tmp_path / "tokenizer")
    recipe = make_recipe(f"tokenize.tokenizer={tmp_path / 'tokenizer'}")
    assert ran(prepare(recipe, tmp_path / "run")) == []
    change(tmp_path / "tokenizer")
    reports = prepare(recipe, tmp_path / "run")
    assert ran(reports) == ["tokenize"]
    assert "config.chat: " in reports[-1].why


def test_a_template_file_changed_in_place(tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe]) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    (tmp_path / "own.jinja").write_text(find_template("chatml"))
    recipe = make_recipe(f"tokenize.chat_template={tmp_path / 'own.jinja'}")
    assert ran(prepare(recipe, tmp_path / "run")) == []  # the very text that the tokenizer has
    (tmp_path / "own.jinja").write_text(find_template("hh"))
    assert ran(prepare(recipe, tmp_path / "run")) == ["tokenize"]


@pytest.mark.parametrize("damage", ["shard gone", "shard cut", "manifest edited"])
def test_a_damaged_output_is_made_anew(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe], damage: str
) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    shard, manifest = (
        tmp_path / "run/tokenize/train/data-00000-of-00002.arrow",
        tmp_path / "run/tokenize/_manifest.json",
    )
    if damage == "shard gone":
        shard.unlink()
    elif damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        manifest.write_text(manifest.read_text().replace('"rows"', '"Rows"', 1))
    (report,) = [report for report in prepare(make_recipe(), tmp_path / "run") if report.ran]
    assert report.stage == "tokenize"
    assert report.why.startswith("the output is damaged: ")
    assert content_hashes(tmp_path / "run") == content_hashes(prepared)


def test_the_input_of_another_stage(tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(OrpoError, match=r"clean: is the output of clean, the output of split is needed here$"):
        stages.tokenize(prepared / "clean", make_recipe(), tmp_path / "out")


def test_a_stage_does_not_overwrite_its_input(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe]
) -> None:
    shutil.copytree(prepared / "binarize", tmp_path / "binarize")
    with pytest.raises(OrpoError, match=r"binarize: holds the output of binarize; choose another folder"):
        stages.clean(tmp_path / "binarize", make_recipe(), tmp_path / "binarize")
    assert read_manifest(tmp_path / "binarize").stage == "binarize"


def test_a_report_says_what_happened(prepared: Path, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    report = stages.clean(prepared / "binarize", make_recipe(), tmp_path / "clean")
    manifest = read_manifest(tmp_path / "clean")
    assert report == StageReport(
        stage="clean",
        path=tmp_path / "clean",
        fingerprint=manifest.fingerprint,
        content_hash=manifest.content_hash,
        rows_in=67,
        rows_out=62,
        dropped=manifest.drop_reasons,
        ran=True,
        why="no output yet",
        seconds=0,
    )
    (item,) = manifest.inputs
    assert (tmp_path / "clean" / item.path).resolve() == (prepared / "binarize").resolve()
    assert item.content_hash == read_manifest(prepared / "binarize").content_hash
