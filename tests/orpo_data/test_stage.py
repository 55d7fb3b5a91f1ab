"""A whole run: every row is accounted for, and the same rows come to the same bytes in any way."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from orpo_data.branch import Branch
from orpo_data.errors import OrpoError
from orpo_data.manifest import Input, Tally, read_manifest
from orpo_data.schema import PAIRS
from orpo_data.shards import read_table
from orpo_data.stage import run_stage
from orpo_data.steps.clean import Clean
from pipelines import stages
from pipelines.layout import Layout
from pipelines.recipe import Recipe

ROOT = Path(__file__).parents[2]
STAGES = ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"]

GOLDEN = {
    "ingest/hh-rlhf": "3cf1d4b4c43ef6af6e3a967c701a84c159a5c84d8b20b55c12ce768e3f52ebcd",
    "ingest/ultrafeedback": "30ce1f01de926560f577b21291d816ff25fd45f54cc86b96cd3d5486e755725b",
    "binarize": "f1a95c7ec84458dee254d560592a72c7ac801da6906c705279f0c595b8c43939",
    "clean": "ba20c030050ebbe1dbfe514a64d02cfa94e49f46c7e483f63c9885a8251b04a4",
    "split": "45ddee9b927cd96d3257441db86752c2e8f84318d158e09d180728efb63138ec",
    "tokenize": "d5cb79c968e3ed4e8195f8231673ebcdb2605dc3b605cadbece26c00f1c02782",
}
"""Content hash of each stage over the raw files of conftest.py. Where one changes, the rows changed:
bump the step's version, or a dataset made before would pass for one made now. Then pin the new hash here."""


def content_hashes(output: Path) -> dict[str, str]:
    return {stage: read_manifest(output / stage).content_hash for stage in STAGES}


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
    Tally(rows_in=5, rows_out=3, dropped={"tie": 2}).check("x")
    Tally(rows_in=5, rows_out=7, expanded=3, dropped={"tie": 1}).check("x")
    with pytest.raises(AssertionError, match="step x lost rows"):
        Tally(rows_in=5, rows_out=3, dropped={"tie": 1}).check("x")


def test_no_rows_left(
    tmp_path: Path, make_pair: Callable[..., Any], make_pairs: Callable[..., pa.Table], table_part: Callable[..., Any]
) -> None:
    def run(rows: pa.Table, *steps: Any) -> None:
        branch = Branch([Input(name="table", fingerprint="f")], [table_part(rows)], steps)
        run_stage("clean", tmp_path / "out", PAIRS, [branch])

    rows = make_pairs([make_pair(chosen="a", rejected="a"), make_pair(chosen="b", rejected="b"), make_pair(chosen="")])
    with pytest.raises(OrpoError, match=r"^clean: no rows left of 3 \(2 identical_pair, 1 empty_turn\)$"):
        run(rows, Clean())
    with pytest.raises(OrpoError, match=r"^clean: no rows left of 0 \(nothing is in table\)$"):
        run(make_pairs(0), Clean())
    assert list(tmp_path.iterdir()) == []
