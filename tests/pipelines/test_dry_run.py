"""`orpo stage tokenize --dry-run`: what it says is what the stage then does."""

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import orpo_data
from orpo_data.chat import Chat
from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from orpo_data.schema import ENCODED
from orpo_data.steps.truncate import Truncate
from pipelines import stages
from pipelines.dry_run import LengthReport, Outcome, _measure, length_tables, measure_lengths

load = cache(lambda folder: Chat.load(str(folder)))


def kept_counts(folder: Path) -> dict[str, int]:
    """What the manifest and the rows of a tokenized dataset say, as an Outcome has it."""
    rows = orpo_data.scan(folder).collect()
    return {
        "kept": len(rows),
        "prompts_shortened": (rows["prompt_turns_dropped"] > 0).sum(),
        "chosen_cut": rows["chosen_truncated"].sum(),
        "rejected_cut": rows["rejected_truncated"].sum(),
        "tokens": sum(shard.tokens or 0 for shard in read_manifest(folder).shards),
    }


@pytest.mark.parametrize(
    "settings",
    [
        ["tokenize.max_length=160", "tokenize.max_prompt_length=96"],
        ["tokenize.max_length=60", "tokenize.max_prompt_length=48"],
        ["tokenize.max_length=60", "tokenize.max_prompt_length=40", "tokenize.overlong_response=drop"],
        ["tokenize.max_length=60", "tokenize.max_prompt_length=20", "tokenize.overlong_prompt=drop"],
    ],
)
def test_the_stage_does_what_the_dry_run_said(
    prepared: Path, make_recipe: Callable[..., Any], tmp_path: Path, settings: list[str]
) -> None:
    recipe = make_recipe(*settings)
    report = measure_lengths(prepared / "split", recipe)
    said = report.outcomes[0]
    stages.tokenize(prepared / "split", recipe, tmp_path / "tokenize")
    manifest = read_manifest(tmp_path / "tokenize")
    assert kept_counts(tmp_path / "tokenize") == {
        name: getattr(said, name) for name in kept_counts(tmp_path / "tokenize")
    }
    assert report.refused + said.dropped == Counter(manifest.drop_reasons)
    assert report.rows == manifest.rows_in


ids = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(st.tuples(ids, ids, ids), max_size=12), st.integers(2, 12), st.integers(1, 11), st.booleans())
def test_rows_within_the_limits_need_no_step(
    chat_tokenizer_dir: Path,
    turns: Callable[..., Any],
    drawn: list[tuple[list[int], list[int], list[int]]],
    max_length: int,
    max_prompt_length: int,
    drop: bool,
) -> None:
    """The counts are those of the step over all rows, identical sides included."""
    names = ("prompt_ids", "chosen_response_ids", "rejected_response_ids")
    rows = [dict.fromkeys(ENCODED.names) | {"prompt": turns("Q")} | dict(zip(names, row, strict=True)) for row in drawn]
    encoded = pa.Table.from_pylist(rows, schema=ENCODED)
    step = Truncate(
        chat=load(chat_tokenizer_dir),
        max_length=max_length,
        max_prompt_length=min(max_prompt_length, max_length - 1),
        overlong_prompt="drop",
        overlong_response="drop" if drop else "truncate",
    )
    report = LengthReport(outcomes=[Outcome(step.max_length, step.max_prompt_length)])
    report.lengths = {name: Counter() for name in ("prompt", "chosen", "rejected", "longer sequence")}
    _measure(encoded, [step], report)
    whole = step.apply(encoded)
    (outcome,) = report.outcomes
    assert outcome.kept == len(whole.kept)
    assert outcome.dropped == Counter(whole.dropped["reason"].to_pylist())
    sides = whole.kept["chosen_input_ids"].to_pylist() + whole.kept["rejected_input_ids"].to_pylist()
    assert outcome.tokens == sum(map(len, sides))
    assert outcome.chosen_cut == sum(whole.kept["chosen_truncated"].to_pylist())


def test_other_limits_are_those_of_a_recipe_that_has_them(prepared: Path, make_recipe: Callable[..., Any]) -> None:
    outcomes = measure_lengths(prepared / "split", make_recipe()).outcomes
    assert [outcome.max_length for outcome in outcomes] == [160, 512, 1024, 2048, 4096, 8192]
    other = outcomes[1]
    assert other.max_prompt_length == 512 * 96 // 160
    limits = [f"tokenize.max_length={other.max_length}", f"tokenize.max_prompt_length={other.max_prompt_length}"]
    assert measure_lengths(prepared / "split", make_recipe(*limits)).outcomes[0] == other


def test_every_row_is_in_the_histogram(prepared: Path, make_recipe: Callable[..., Any]) -> None:
    report = measure_lengths(prepared / "split", make_recipe())
    assert report.refused == {"control_token_in_text": 1}
    for name in report.lengths:
        assert sum(report.histogram(name)) == report.rows - 1
    assert {96, 160} <= set(report.edges())


def test_a_histogram_worked_by_hand() -> None:
    report = LengthReport(
        outcomes=[Outcome(200, 100)], lengths={"prompt": Counter({1: 2, 64: 1, 65: 1, 100: 3, 201: 1})}
    )
    assert report.edges() == [64, 100, 128, 200, 201]
    assert report.histogram("prompt") == [3, 4, 0, 0, 1]
    assert report.to_json()["lengths"]["prompt"] == {
        "min": 1,
        "median": 100,
        "p95": 201,
        "max": 201,
        "up_to": {64: 3, 100: 4, 128: 0, 200: 0, 201: 1},
    }


def test_no_row_with_a_length() -> None:
    report = LengthReport(
        outcomes=[Outcome(200, 100)], lengths={"prompt": Counter(), "chosen": Counter(), "rejected": Counter()}
    )
    assert report.histogram("prompt") == [0]
    assert length_tables(report)


def test_the_command_prints_and_writes_nothing(
    orpo: Callable[..., Any],
    recipe_file: Callable[..., Path],
    prepared: Path,
    tmp_path: Path,
    snapshot: Callable[..., Any],
) -> None:
    recipe = recipe_file()
    before = snapshot(tmp_path)
    done = orpo("stage", "tokenize", recipe, "--input", prepared / "split", "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0
    for text in ("up to 64", "max_prompt_length", "1 prompt_too_long", "nothing is written"):
        assert text in done.out
    told = json.loads(orpo("stage", "tokenize", recipe, "--input", prepared / "split", "--dry-run", "--json").out)
    assert told["outcomes"][0]["dropped"] == {"prompt_too_long": 1}
    assert told["refused"] == {"control_token_in_text": 1}
    assert snapshot(tmp_path) == before


def test_another_stage_has_no_dry_run(orpo: Callable[..., Any], recipe_file: Callable[..., Path]) -> None:
    done = orpo("stage", "clean", recipe_file(), "--dry-run")
    assert (done.code, done.err) == (2, "orpo: --dry-run: is for the stage tokenize, not for clean\n")


def test_pairs_that_are_not_cleaned(prepared: Path, make_recipe: Callable[..., Any]) -> None:
    with pytest.raises(OrpoError, match="is the output of binarize, the output of clean or split is needed here"):
        measure_lengths(prepared / "binarize", make_recipe())
