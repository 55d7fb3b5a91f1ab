"""Rows, lengths and margins before and after each step."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest

from orpo_data.chain import read_sound_chain
from orpo_data.manifest import StepCounts, read_manifest
from orpo_data.pages.effects import Standing, effects
from orpo_data.pages.measures import measure
from orpo_data.pages.rows import Rows, read_dropped, read_input_rows, read_rows
from orpo_data.schema import DROPPED, PAIRS
from pipelines import stages

Make = Callable[..., Any]


@pytest.fixture(params=[1, 10_000])
def shown(
    make_pair: Make,
    tmp_path: Path,
    write_dataset: Make,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Callable[..., dict[str, list[Standing]]]:
    """The effects of the steps one, two and three on `kept` pairs and on those that fell, by the step they fell at."""
    monkeypatch.setattr("orpo_data.pages.rows.ROWS_AT_ONCE", request.param)

    def run(
        kept: list[Any], fallen: list[tuple[str, Any]], changed: int = 0, came_in: list[Any] | None = None
    ) -> dict[str, list[Standing]]:
        write_dataset(tmp_path / "d", PAIRS, {None: kept})
        steps = [
            StepCounts(step=name, version=1, source=None, config={}, changed=changed if name == "one" else 0)
            for name in ("one", "two", "three")
        ]
        manifest = read_manifest(tmp_path / "d")
        places = {name: [row[name] for _, row in fallen] for name in ("id", "source", "source_file", "source_row")}
        dropped = pa.table(
            {
                "step": [step for step, _ in fallen],
                "reason": ["x"] * len(fallen),
                "detail": pa.nulls(len(fallen), pa.string()),
                "row": [orjson.dumps(row).decode() for _, row in fallen],
                **places,
            }
        )
        tables = [dropped.select(DROPPED.names).cast(DROPPED)]
        before = None if came_in is None else Rows([pa.Table.from_pylist(came_in, schema=PAIRS)], [None])
        return effects(
            manifest.model_copy(update={"steps": steps}),
            measure(read_rows(tmp_path / "d", manifest)),
            Rows(tables, [None]),
            before,
        )

    return run


def test_a_row_counts_until_the_step_that_dropped_it(shown: Make, make_pair: Make) -> None:
    kept = [make_pair("ab", "long answer", "no", score_chosen=5.0, score_rejected=1.0)]
    fallen = [
        ("one", make_pair("abcd", "no", "long answer", score_chosen=4.0, score_rejected=4.0)),
        ("three", make_pair("abcdef", "no", "long", score_chosen=2.0)),
    ]
    assert shown(kept, fallen) == {
        "test": [
            Standing(None, rows=3, prompt=4, chosen=2, rejected=4, chosen_longer=1 / 3, margin=2),
            Standing("one", rows=2, prompt=4, chosen=6.5, rejected=3, chosen_longer=0.5, margin=4),
            Standing("two", rows=2, prompt=4, chosen=6.5, rejected=3, chosen_longer=0.5, margin=4),
            Standing("three", rows=1, prompt=2, chosen=11, rejected=2, chosen_longer=1, margin=4),
        ]
    }


def test_what_a_step_changed_is_read_from_the_input(shown: Make, make_pair: Make) -> None:
    kept = [make_pair("ab")]
    before, *after = shown(kept, [], changed=1, came_in=[make_pair("a\u200bb"), make_pair("a\u200bb\u200b")])["test"]
    assert (before.step, before.rows, before.prompt) == (None, 2, 3.5)
    assert [(now.step, now.rows, now.prompt) for now in after] == [(name, 1, 2) for name in ("one", "two", "three")]


def test_without_the_input_nothing_is_said_of_what_stood_before_a_change(shown: Make, make_pair: Make) -> None:
    assert [now.step for now in shown([make_pair("ab")], [], changed=1)["test"]] == ["one", "two", "three"]


def test_each_source_has_its_own_unit_and_scores_that_are_not_there_are_none(shown: Make, make_pair: Make) -> None:
    kept = [
        make_pair("a", source="uf", score_chosen=5.0, score_rejected=1.0),
        make_pair("b", source="hh"),
        make_pair("c", source="hh"),
    ]
    found = shown(kept, [("two", make_pair("d", source="uf", score_chosen=30.0, score_rejected=10.0))])
    assert list(found) == ["hh", "uf"]
    assert [now.margin for now in found["uf"]] == [12, 12, 4, 4]
    assert {now.margin for now in found["hh"]} == {None}


def test_a_source_of_which_nothing_is_left_yet_was_there(shown: Make, make_pair: Make) -> None:
    """It has no row in the dataset any more, so it is none of its sources: its rows stand in the flow alone."""
    assert list(shown([make_pair("a")], [("one", make_pair("b", source="gone"))])) == ["test"]


def test_rows_are_those_of_the_manifest(make_recipe: Make, prepared: Path, tmp_path: Path) -> None:
    stages.clean(prepared / "binarize", make_recipe("normalise={}", "dedup={near: 0.5}"), tmp_path / "clean")
    manifest = read_manifest(tmp_path / "clean")
    folder = tmp_path / "clean"
    came_in = read_input_rows(read_sound_chain(folder, manifest))
    found = effects(manifest, measure(read_rows(folder, manifest)), read_dropped(folder, manifest), came_in)
    rows: Counter[str | None] = Counter()
    for standings in found.values():
        rows.update({now.step: now.rows for now in standings})
    assert rows == {None: manifest.rows_in} | {step.step: step.rows_out for step in manifest.steps}
    assert manifest.rows_in > manifest.rows


@pytest.mark.parametrize("stage", ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "tokenize"])
def test_stages_that_judge_no_pairs_of_all_sources(prepared: Path, stage: str) -> None:
    manifest = read_manifest(prepared / stage)
    folder = prepared / stage
    assert effects(manifest, measure(read_rows(folder, manifest)), read_dropped(folder, manifest), None) == {}


def test_the_table_on_the_page(prepared: Path, read_page: Make) -> None:
    words = read_page((prepared / "clean" / "report.html").read_text()).words
    assert "Before and after each step medians: lengths in characters" in words
    assert "After step Pairs Prompt Chosen Rejected Chosen is longer Margin" in words
    assert "Before and after each step" not in read_page((prepared / "tokenize" / "report.html").read_text()).words
