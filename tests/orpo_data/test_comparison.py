"""Two versions of a dataset told apart: cases worked by hand, and laws that hold for any two."""

import dataclasses
import json
import shutil
from typing import Any, ClassVar

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orpo_data
from orpo_data.comparison import Diff, Drops, Move
from orpo_data.errors import OrpoError
from orpo_data.manifest import Input, read_manifest
from orpo_data.schema import PAIRS
from orpo_data.stage import Branch, run_stage
from orpo_data.steps.step import Step, StepOutput, divide
from pipelines import prepare, stages
from pipelines.layout import Layout


class Picky(Step):
    """Drops rows with a chosen score below `least`."""

    name: ClassVar[str] = "picky"
    version: ClassVar[int] = 1
    least: float = 0

    def apply(self, table: pa.Table) -> StepOutput:
        reasons = [
            None if score is None or score >= self.least else "too_low" for score in table["score_chosen"].to_pylist()
        ]
        return StepOutput(*divide(self.name, table, pa.array(reasons, pa.string()), pa.nulls(len(table), pa.string())))


@pytest.fixture
def write(make_pair, tmp_path):
    """A dataset of pairs in a folder: rows are (record, question, score), in the order given."""

    def write(name, rows, least=0.0, splits=()):
        pairs = [make_pair(f"{text}?", score_chosen=score, source_row=record) for record, text, score in rows]
        table = pa.Table.from_pylist(pairs, schema=PAIRS)

        def read(size):
            return ((None, table.slice(i, size)) for i in range(0, len(table), size))

        raw = Input(name="test.jsonl", fingerprint=str(hash(tuple(rows))))
        run_stage("clean", tmp_path / name, PAIRS, [Branch(inputs=[raw], read=read, steps=[Picky(least=least)])])
        return tmp_path / name

    return write


def mirrored(diff: Diff) -> Diff:
    """What the comparison the other way round must find."""
    swap = {"old": diff.new, "new": diff.old, "rows_out": diff.rows_in, "rows_in": diff.rows_out}
    turned = [line.split(": ", 1) for line in diff.settings]
    return dataclasses.replace(
        diff,
        **swap,
        why_out=diff.why_in,
        why_in=diff.why_out,
        dropped=tuple(Drops(d.step, d.reason, d.new, d.old) for d in diff.dropped),
        settings=tuple(f"{path}: {' -> '.join(reversed(values.split(' -> ')))}" for path, values in turned),
        shifts=tuple(dataclasses.replace(shift, old=shift.new, new=shift.old) for shift in diff.shifts),
    )


def counts(diff: Diff) -> tuple[int, int, int, int]:
    return diff.rows_same, diff.rows_changed, diff.rows_out, diff.rows_in


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_a_dataset_and_itself(write):
    folder = write("a", [(0, "one", 1.0), (1, "two", None)])
    diff = orpo_data.diff(folder, folder)
    assert diff.empty
    assert counts(diff) == (2, 0, 0, 0)
    assert (diff.why_out, diff.why_in, diff.changed_columns, diff.settings) == ((), (), {}, ())
    assert all(shift.distance == 0 for shift in diff.shifts)


def test_one_row_of_each_fate(write):
    old = write("old", [(0, "stays", 3.0), (1, "goes", 3.0), (2, "before", 3.0), (3, "scored", 3.0), (4, "falls", 1.0)])
    new = write(
        "new",
        [(0, "stays", 3.0), (2, "after", 3.0), (3, "scored", 4.0), (4, "falls", 1.0), (5, "comes", 5.0)],
        least=2,
    )
    diff = orpo_data.diff(old, new)
    assert counts(diff) == (1, 2, 2, 1)
    assert diff.changed_columns == {"id": 1, "prompt": 1, "score_chosen": 1}
    assert diff.why_out == (Move("clean", "picky", "too_low", 1), Move(None, None, None, 1))
    assert diff.why_in == (Move(None, None, None, 1),)
    assert diff.dropped == (Drops("picky", "too_low", 0, 1),)
    old_input, new_input = (read_manifest(folder).inputs[0].fingerprint[:12] for folder in (old, new))
    assert diff.settings == (f"input.test.jsonl: {old_input} -> {new_input}", "picky.least: 0.0 -> 2.0")
    assert (diff.old.rows_read, diff.old.rows, diff.new.rows_read, diff.new.rows) == (5, 5, 5, 4)


def test_a_row_that_was_dropped_before_says_why(write):
    rows = [(0, "high", 3.0), (1, "low", 1.0)]
    diff = orpo_data.diff(write("strict", rows, least=2), write("lax", rows))
    assert diff.why_in == (Move("clean", "picky", "too_low", 1),)
    assert counts(diff) == (1, 0, 0, 1)


def test_rows_that_moved_in_their_file_are_the_same(write):
    """One line less above them."""
    rows = [(i, f"question {i}", 1.0) for i in range(6)]
    diff = orpo_data.diff(write("old", rows), write("new", [(i - 1, text, score) for i, text, score in rows[1:]]))
    assert counts(diff) == (5, 0, 1, 0)


def test_several_rows_of_one_record_are_told_apart(write):
    old = write("old", [(0, "a", 1.0), (0, "b", 1.0), (0, "c", 1.0)])
    new = write("new", [(0, "c", 1.0), (0, "d", 1.0)])
    assert counts(orpo_data.diff(old, new)) == (1, 1, 1, 0)


def test_copies_in_other_records_are_counted_each(write):
    old = write("old", [(0, "a", 1.0), (1, "a", 2.0), (2, "a", 3.0)])
    diff = orpo_data.diff(old, write("new", [(1, "a", 2.0)]))
    assert counts(diff) == (1, 0, 2, 0)
    assert diff.shifts[0].distance == pytest.approx(1 / 3)  # of the scores: below 2 a third against none


def test_a_row_that_changed_sides(prepared, tmp_path, make_recipe):
    stages.split(prepared / "clean", make_recipe("split.seed=1"), tmp_path / "split")
    diff = orpo_data.diff(prepared / "split", tmp_path / "split")
    assert diff.rows_changed > 0
    assert diff.changed_columns == {"split": diff.rows_changed}
    assert (diff.rows_in, diff.rows_out) == (0, 0)
    assert "split.seed: 42 -> 1" in diff.settings


# --- through the chain -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stricter(make_recipe, tmp_path_factory):
    """The prepared run with other settings in two stages."""
    output = tmp_path_factory.mktemp("stricter")
    prepare(make_recipe("binarize.strategy=honesty", "tokenize.max_prompt_length=40"), output)
    return output


def test_token_ids_are_told_apart_by_what_befell_their_records(prepared, stricter):
    diff = orpo_data.diff(prepared / "tokenize", stricter / "tokenize")
    fallen = orpo_data.scan(stricter / "tokenize", "dropped").filter(pl.col("reason") == "prompt_too_long").collect()
    before = orpo_data.scan(prepared / "tokenize", "dropped").filter(pl.col("reason") == "prompt_too_long").collect()
    assert diff.why_out == (Move("tokenize", "truncate", "prompt_too_long", len(fallen) - len(before)),)
    assert diff.rows_out == len(fallen) - len(before)
    assert diff.old.rows - diff.rows_out + diff.rows_in == diff.new.rows


def test_a_fall_in_an_earlier_stage_is_found(prepared, tmp_path, make_recipe):
    """A record that made a pair, and makes none with a wider margin: its rated row has another id than its pair."""
    prepare(make_recipe("binarize.min_margin=4"), tmp_path)
    diff = orpo_data.diff(prepared / "tokenize", tmp_path / "tokenize")
    (move,) = diff.why_out
    assert (move.stage, move.step, move.reason) == ("binarize", "binarize", "low_margin")
    assert move.rows == diff.rows_out > 0


def test_a_chain_that_is_no_longer_what_was_read_is_not_asked(prepared, own_raw_data, tmp_path, make_recipe):
    """Its stages were written anew: where a row falls there says nothing of this version."""
    old = Layout(tmp_path / "old")
    file = own_raw_data / "uf/evol_instruct.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:15]))
    prepare(make_recipe(raw=own_raw_data), old.root)
    file.write_text("".join(lines))
    later = make_recipe("binarize.min_margin=4", raw=own_raw_data)
    stages.ingest(later.sources[1], later, old.ingest("ultrafeedback"))
    stages.binarize([old.ingest(source.label) for source in later.sources], later, old.binarize)
    assert orpo_data.scan(old.binarize, "dropped").filter(pl.col("reason") == "low_margin").collect().height == 20
    diff = orpo_data.diff(old.tokenize, prepared / "tokenize")
    assert diff.why_in == (Move(None, None, None, diff.rows_in),)
    assert diff.rows_in == 5


@pytest.mark.parametrize("stage", ["ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"])
def test_every_stage_compares_with_itself_and_with_another(prepared, stricter, stage):
    assert orpo_data.diff(prepared / stage, prepared / stage).empty
    diff = orpo_data.diff(prepared / stage, stricter / stage)
    assert diff.empty == (stage == "ingest/ultrafeedback")
    assert diff.rows_same + diff.rows_changed + diff.rows_out == read_manifest(prepared / stage).rows
    assert mirrored(diff) == orpo_data.diff(stricter / stage, prepared / stage)
    assert json.loads(json.dumps(diff.to_json()))["rows_in"] == diff.rows_in


# --- laws ------------------------------------------------------------------------------------------------------------

ROWS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from("abcd"), st.sampled_from([None, 1.0, 2.0])), min_size=1, max_size=8
).filter(lambda rows: any(score != 1.0 for _, _, score in rows))


@given(old=ROWS, new=ROWS, least=st.sampled_from([0.0, 2.0]))
@settings(max_examples=12)
def test_laws(write, tmp_path, old, new, least):
    for name in ("old", "new"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    before, after = write("old", old), write("new", new, least)
    diff = orpo_data.diff(before, after)
    assert diff.rows_same + diff.rows_changed + diff.rows_out == diff.old.rows
    assert diff.old.rows - diff.rows_out + diff.rows_in == diff.new.rows
    assert sum(move.rows for move in diff.why_out) == diff.rows_out
    assert sum(move.rows for move in diff.why_in) == diff.rows_in
    assert (diff.rows_changed > 0) == bool(diff.changed_columns)
    assert mirrored(diff) == orpo_data.diff(after, before)
    assert orpo_data.diff(after, after).empty


# --- bad input -------------------------------------------------------------------------------------------------------


def test_two_stages_are_not_compared(prepared):
    with pytest.raises(OrpoError, match="compare two versions of one stage's output"):
        orpo_data.diff(prepared / "clean", prepared / "split")


def test_what_is_no_dataset(prepared, tmp_path):
    with pytest.raises(OrpoError, match="not a dataset folder"):
        orpo_data.diff(prepared / "clean", tmp_path)


def test_a_model_is_no_dataset(prepared, tmp_path):
    model = read_manifest(prepared / "clean").model_copy(update={"stage": "train", "dropped": []})
    from orpo_data.comparison import compare

    with pytest.raises(OrpoError, match="is the output of train; datasets are compared, not models"):
        compare(prepared / "clean", read_manifest(prepared / "clean"), tmp_path, model)


def test_a_shard_that_is_missing(write):
    old, new = write("old", [(0, "a", 1.0)]), write("new", [(0, "a", 1.0)])
    next(new.glob("*.arrow")).unlink()
    with pytest.raises(OrpoError, match="is missing"):
        orpo_data.diff(old, new)


def test_as_plain_values(write):
    folder = write("a", [(0, "one", 1.0)])
    told: dict[str, Any] = orpo_data.diff(folder, folder).to_json()
    assert told["empty"] is True
    assert told["old"]["path"] == str(folder)
    assert json.loads(json.dumps(told)) == told | {
        name: list(told[name]) for name in ("why_out", "why_in", "dropped", "settings")
    } | {"shifts": list(told["shifts"])}
