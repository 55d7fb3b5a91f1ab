"""Every row is accounted for; a stage runs when what it depends on changed, says so, and ends in the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.chat import find_template
from orpo_data.errors import OrpoError
from orpo_data.manifest import Input, StepCounts, read_manifest
from orpo_data.schema import PAIRS
from orpo_data.shards import read_table
from orpo_data.stage import Branch, StageReport, run_stage
from orpo_data.steps.binarize import Binarize
from orpo_data.steps.clean import Clean
from orpo_data.steps.split import Split
from orpo_data.steps.step import Step, StepOutput, divide
from pipelines import prepare, stages
from pipelines.layout import Layout
from pipelines.recipe import Recipe

ROOT = Path(__file__).parents[2]
STAGES = ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"]

GOLDEN = {
    "ingest/hh-rlhf": "3cf1d4b4c43ef6af6e3a967c701a84c159a5c84d8b20b55c12ce768e3f52ebcd",
    "ingest/ultrafeedback": "30ce1f01de926560f577b21291d816ff25fd45f54cc86b96cd3d5486e755725b",
    "binarize": "809021823217c16ded9a4e4d9b125b0a42768adebeb76c87b2e2f67887bbdd32",
    "clean": "8e16ccd58f81c8b51b58bd18528410ec540e947cc07e25202bce13f6e63930b2",
    "split": "40027920b631ac9f60f9be9a892543a34b18cd16fe5e2666a3c29954e541f7ff",
    "tokenize": "0c70c0cabfe8c79cb5f93881811d6b902fd2567a132c68aee60f914b56097448",
}
"""Content hash of each stage over the raw files of conftest.py. Where one changes, the rows changed:
bump the step's version, or a dataset made before would pass for one made now. Then pin the new hash here."""


def content_hashes(output: Path) -> dict[str, str]:
    return {stage: read_manifest(output / stage).content_hash for stage in STAGES}


def modified(output: Path) -> dict[str, int]:
    """When each manifest was written."""
    return {stage: (output / stage / "_manifest.json").stat().st_mtime_ns for stage in STAGES}


def ran(reports: list[StageReport]) -> list[str]:
    return [report.stage for report in reports if report.ran]


# --- the same rows in any way ----------------------------------------------------------------------------------------


def test_golden_content_hashes(prepared: Path) -> None:
    assert content_hashes(prepared) == GOLDEN


@pytest.mark.parametrize("batch_rows", [1, 7])
def test_the_batch_size_does_not_matter(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe], batch_rows: int
) -> None:
    recipe, place = make_recipe(), Layout(tmp_path)
    for source in recipe.sources:
        stages.ingest(source, recipe, place.ingest(source.label), batch_rows=batch_rows)
    ingested = [place.ingest(source.label) for source in recipe.sources]
    stages.binarize(ingested, recipe, place.binarize, batch_rows=batch_rows)
    stages.clean(place.binarize, recipe, place.clean, batch_rows=batch_rows)
    stages.split(place.clean, recipe, place.split, batch_rows=batch_rows)
    stages.tokenize(place.split, recipe, place.tokenize, batch_rows=batch_rows)
    assert content_hashes(tmp_path) == content_hashes(prepared)


def test_real_dialogues_in_batches_of_any_size(
    tmp_path: Path, real_data: Path, make_recipe: Callable[..., Recipe]
) -> None:
    """More rows than a record batch has."""
    sources = f"sources=[{{dataset: hh-rlhf, path: {real_data / 'hh_rlhf/harmless-base'}}}]"
    recipe = make_recipe(sources, "tokenize.max_length=512", "tokenize.max_prompt_length=384")
    hashes = []
    for batch_rows in (1000, 313):
        place = Layout(tmp_path / str(batch_rows))
        stages.ingest(recipe.sources[0], recipe, place.ingest("hh-rlhf"), batch_rows=batch_rows)
        stages.binarize([place.ingest("hh-rlhf")], recipe, place.binarize, batch_rows=batch_rows)
        stages.clean(place.binarize, recipe, place.clean, batch_rows=batch_rows)
        stages.split(place.clean, recipe, place.split, batch_rows=batch_rows)
        report = stages.tokenize(place.split, recipe, place.tokenize, batch_rows=batch_rows)
        hashes.append(report.content_hash)
    assert hashes[0] == hashes[1]
    assert report.rows_in > 1400
    for row in read_table(report.path).to_pylist():
        prompt, chosen, rejected = row["prompt_len"], row["chosen_input_ids"], row["rejected_input_ids"]
        assert chosen[:prompt] == rejected[:prompt]
        assert 0 < prompt <= 384
        assert prompt < min(len(chosen), len(rejected)) <= max(len(chosen), len(rejected)) <= 512


PREPARE = """
import sys
from pipelines import Recipe, prepare
prepare(Recipe.read(sys.argv[1]), sys.argv[2])
"""


def test_threads_locale_and_hash_seed_do_not_matter(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe]
) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(make_recipe("name=café").resolved()))
    environments = [
        {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "PYTHONHASHSEED": "1"},
        {
            "TOKENIZERS_PARALLELISM": "true",
            "RAYON_NUM_THREADS": "2",
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "TZ": "Asia/Tokyo",
        },
    ]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(tmp_path / "recipe.yaml"), str(tmp_path / str(i))],
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
        )
        for i, environment in enumerate(environments)
    ]
    for i, child in enumerate(children):
        assert child.wait(100) == 0
        assert content_hashes(tmp_path / str(i)) == content_hashes(prepared)


# --- every row accounted for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_rows_in_are_rows_out_and_dropped(prepared: Path, stage: str) -> None:
    manifest = read_manifest(prepared / stage)
    expanded = sum(step.expanded for step in manifest.steps)
    dropped = read_table(prepared / stage, "dropped").to_pylist()
    assert manifest.rows_in + expanded == manifest.rows + len(dropped)
    assert len(read_table(prepared / stage)) == manifest.rows
    counted: dict[tuple[str, str, str], int] = {}
    for row in dropped:
        assert row["source_file"]
        assert row["source_row"] is not None
        assert row["reason"] == "unparsable" or json.loads(row["row"])["source_row"] == row["source_row"]
        key = (row["source"], row["step"], row["reason"])
        counted[key] = counted.get(key, 0) + 1
    of_steps = {
        (step.source, step.step, reason): count for step in manifest.steps for reason, count in step.dropped.items()
    }
    if all(step.source for step in manifest.steps):
        assert counted == of_steps
    else:
        assert sum(counted.values()) == sum(of_steps.values())
    for step in manifest.steps:
        assert step.rows_in + step.expanded == step.rows_out + sum(step.dropped.values())


def test_what_the_stages_read_and_left_out(prepared: Path) -> None:
    """The planted defects of conftest.py, each dropped once."""
    reasons = {stage: read_manifest(prepared / stage).drop_reasons for stage in STAGES}
    assert reasons == {
        "ingest/hh-rlhf": {"unparsable": 1},
        "ingest/ultrafeedback": {},
        "binarize": {"rating_missing": 1, "tie": 1, "too_few_completions": 1},
        "clean": dict.fromkeys(
            ["diverges_early", "empty_turn", "ends_with_human", "identical_pair", "not_alternating"], 1
        ),
        "split": {},
        "tokenize": {"control_token_in_text": 1, "prompt_too_long": 1},
    }
    for stage, before in zip(STAGES[3:], STAGES[2:], strict=False):
        assert read_manifest(prepared / stage).rows_in == read_manifest(prepared / before).rows
    steps = [step.step for step in read_manifest(prepared / "tokenize").steps]
    assert steps == ["chat_template", "tokenize", "truncate"]


def test_a_row_that_vanishes_is_a_defect_of_the_step() -> None:
    counts = {"step": "x", "version": 1, "source": None, "config": {}, "rows_in": 5, "rows_out": 3}
    StepCounts(**counts, dropped={"tie": 2}).check()
    StepCounts(**counts | {"rows_out": 7}, expanded=3, dropped={"tie": 1}).check()
    with pytest.raises(AssertionError, match="lost rows"):
        StepCounts(**counts, dropped={"tie": 1}).check()


class Loser(Step):
    """Forgets a row."""

    name = "loser"
    version = 1

    def apply(self, table: pa.Table) -> StepOutput:
        return StepOutput(table.slice(1), divide("loser", table.slice(0, 0), *[pa.array([], pa.string())] * 2)[1])


class Modulo(Step):
    """Drops the rows whose number leaves no remainder."""

    name = "modulo"
    version = 1
    by: int

    def apply(self, table: pa.Table) -> StepOutput:
        reasons = ["divisible" if n % self.by == 0 else None for n in table["source_row"].to_pylist()]
        return StepOutput(*divide(self.name, table, pa.array(reasons, pa.string()), pa.nulls(len(table), pa.string())))


def branch_of(table: pa.Table, *steps: Any, source: str | None = "test", fingerprint: str = "f") -> Branch:
    def read(batch_rows: int) -> Iterator[tuple[None, pa.Table]]:
        for start in range(0, len(table), batch_rows):
            yield None, table.slice(start, batch_rows)

    return Branch([Input(name="table", fingerprint=fingerprint)], read, steps, source)


def test_a_stage_with_such_a_step_writes_nothing(tmp_path: Path, make_pairs: Callable[..., pa.Table]) -> None:
    with pytest.raises(AssertionError, match="step loser lost rows"):
        run_stage("clean", tmp_path / "out", PAIRS, [branch_of(make_pairs(5), Loser())])
    assert list(tmp_path.iterdir()) == []


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(2, 5), max_size=3)), min_size=1, max_size=3),
    st.integers(1, 12),
)
def test_any_chain_of_steps_accounts_for_every_row(
    tmp_path_factory: pytest.TempPathFactory, make_pairs: Callable[..., pa.Table], chains: list[Any], batch_rows: int
) -> None:
    rows = [0, *(row for count, _ in chains for row in range(count))]
    branches = [
        branch_of(make_pairs(count), *(Modulo(by=by) for by in bys), source=str(i))
        for i, (count, bys) in enumerate(chains)
    ]
    branches.append(branch_of(make_pairs(1), source="more"))  # so that some row is left
    seen: list[int] = []
    out = tmp_path_factory.mktemp("chain") / "out"
    report = run_stage("clean", out, PAIRS, branches, batch_rows=batch_rows, progress=seen.append)
    kept, dropped = read_table(out), read_table(out, "dropped")
    expected = [n for count, bys in chains for n in range(count) if all(n % by for by in bys)] + [0]
    assert kept["source_row"].to_pylist() == expected
    assert report.rows_in == len(rows) == len(kept) + len(dropped)
    assert report.dropped == ({"divisible": len(dropped)} if len(dropped) else {})
    assert seen == sorted(seen)
    assert seen[-1] == len(rows)


def test_no_rows_left(tmp_path: Path, make_pair: Callable[..., Any], make_pairs: Callable[..., pa.Table]) -> None:
    rows = make_pairs([make_pair(chosen="a", rejected="a"), make_pair(chosen="b", rejected="b"), make_pair(chosen="")])
    with pytest.raises(OrpoError, match=r"^clean: no rows left of 3 \(2 identical_pair, 1 empty_turn\)$"):
        run_stage("clean", tmp_path / "out", PAIRS, [branch_of(rows, Clean())])
    with pytest.raises(OrpoError, match=r"^clean: no rows left of 0 \(nothing is in table\)$"):
        run_stage("clean", tmp_path / "out", PAIRS, [branch_of(make_pairs(0), Clean(), Split())])
    assert list(tmp_path.iterdir()) == []


# --- run again, or not -----------------------------------------------------------------------------------------------


def test_an_unchanged_run_touches_nothing(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Recipe], raw_data: Path, chat_tokenizer_dir: Path
) -> None:
    """Nor does one whose raw files, tokenizer and outputs were moved elsewhere, and whose name is another."""
    shutil.copytree(prepared, tmp_path / "run", copy_function=shutil.copy2)
    shutil.copytree(raw_data, tmp_path / "raw")
    (tmp_path / "raw/hh/train.jsonl").rename(tmp_path / "raw/hh/renamed.jsonl")
    shutil.copytree(chat_tokenizer_dir, tmp_path / "tokenizer")
    before = modified(tmp_path / "run")
    moved = make_recipe("name=another", f"tokenize.tokenizer={tmp_path / 'tokenizer'}", raw=tmp_path / "raw")
    reports = prepare(moved, tmp_path / "run")
    assert ran(reports) == []
    assert {report.why for report in reports} == {"unchanged"}
    assert modified(tmp_path / "run") == before
    assert [report.content_hash for report in reports] == list(content_hashes(prepared).values())


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
        tmp_path / "run/tokenize/train/data-00000-of-00001.arrow",
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
