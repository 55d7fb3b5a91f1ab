"""What a stage makes of its parts: the same bytes however it is worked on, nothing done twice or in vain."""

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import orpo_data
from orpo_data.branch import Branch
from orpo_data.errors import OrpoError
from orpo_data.events import EVENTS_NAME
from orpo_data.manifest import MANIFEST_NAME, read_manifest
from orpo_data.reuse import PARTS_NAME
from orpo_data.shards import read_table
from orpo_data.stage import run_stage

CHAINS = st.lists(st.tuples(st.sampled_from(["without", "twice", "first", "shift"]), st.integers(2, 4)), max_size=5)
"""No global step, or several, in any place and in a row."""

VALUES = st.lists(st.integers(0, 40), max_size=12).map(tuple)
INPUTS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4)
WITHOUT_END = (1, 7, 11)  # values that hardly any step drops, so that some row is left


def state(folder: Path) -> dict[str, Any]:
    """Every file of a dataset folder but the events, the manifest without what stands in it of them."""
    files: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop(MANIFEST_NAME))
    del files[EVENTS_NAME], manifest["files"][EVENTS_NAME], manifest["checksum"]
    return files | {"manifest": manifest}


def parts_of(toys: Any, inputs: dict[str, tuple[int, ...]], split: bool = False) -> list[Any]:
    """The parts in the order of the mapping, and one that leaves rows."""
    names = ["train", "eval"] if split else [None]
    return [
        toys.part(name, values, names[i % len(names)])
        for i, (name, values) in enumerate([*inputs.items(), ("z", WITHOUT_END)])
    ]


def records(output: Path) -> list[dict[str, Any]]:
    """What the parts came to."""
    return orjson.loads((output / PARTS_NAME).read_bytes())


def run(toys: Any, output: Path, parts: list[Any], chain: Any, **options: Any) -> Any:
    """The state of the folder, or what the stage says when no row is left."""
    output.parent.mkdir(exist_ok=True)
    try:
        toys.run(output, parts, chain, **options)
    except OrpoError as error:
        return str(error)
    assert orpo_data.verify(output).ok
    return state(output)


# --- the same bytes --------------------------------------------------------------------------------------------------


@given(inputs=INPUTS, chain=CHAINS, batch_rows=st.integers(1, 13), workers=st.integers(1, 4), split=st.booleans())
@settings(max_examples=20)
def test_neither_batches_nor_threads_matter(
    toys: Any, tmp_path_factory: Any, inputs: Any, chain: Any, batch_rows: int, workers: int, split: bool
) -> None:
    folder, parts = tmp_path_factory.mktemp("runs"), parts_of(toys, inputs, split)
    whole = run(toys, folder / "1/out", parts, chain, batch_rows=1_000, workers=1)
    assert run(toys, folder / "2/out", parts, chain, batch_rows=batch_rows, workers=workers) == whole


@given(before=INPUTS, after=INPUTS, chain=CHAINS, batch_rows=st.sampled_from([3, 5]), split=st.booleans())
@example(before={"a": (1,)}, after={}, chain=[], batch_rows=3, split=True)  # the last part goes to the other side
@settings(max_examples=30)
def test_what_changed_is_worked_on_with_the_result_of_a_fresh_run(
    toys: Any, tmp_path_factory: Any, before: Any, after: Any, chain: Any, batch_rows: int, split: bool
) -> None:
    """Parts are changed, added, removed, put in another order."""
    folder = tmp_path_factory.mktemp("runs")
    run(toys, folder / "1/out", parts_of(toys, before, split), chain, batch_rows=4)
    fresh = run(toys, folder / "2/out", parts_of(toys, after, split), chain, batch_rows=4)
    assert run(toys, folder / "1/out", parts_of(toys, after, split), chain, batch_rows=batch_rows) == fresh


@pytest.mark.parametrize("kind", ["without", "shift", "first"])
def test_two_parts_with_the_same_rows(toys: Any, tmp_path: Path, kind: str) -> None:
    """They share their key, and what one came to holds for the other."""
    twins = [toys.part("a", WITHOUT_END), toys.part("b", (1, 3)), toys.part("a", WITHOUT_END)]
    fresh = run(toys, tmp_path / "1/out", twins, [(kind, 4)])
    run(toys, tmp_path / "2/out", twins[:2], [(kind, 4)])
    assert run(toys, tmp_path / "2/out", twins, [(kind, 4)]) == fresh
    assert run(toys, tmp_path / "1/out", twins[::-1], [(kind, 4)]) == fresh | run(
        toys, tmp_path / "3/out", twins[::-1], [(kind, 4)]
    )


@given(inputs=INPUTS, chain=CHAINS, batch_rows=st.integers(1, 13))
@example({"a": (1, 2, 3, 4, 6), "b": (9, 8, 2)}, [("without", 3), ("without", 2), ("first", 3), ("without", 4)], 2)
@settings(max_examples=10)
def test_dropped_rows_come_by_part_then_step_then_row(
    toys: Any, tmp_path_factory: Any, inputs: Any, chain: Any, batch_rows: int
) -> None:
    output, parts = tmp_path_factory.mktemp("runs") / "1/out", parts_of(toys, inputs)
    if isinstance(run(toys, output, parts, chain, batch_rows=batch_rows), str):
        return
    dropped = read_table(output, "dropped").to_pylist()
    order = {part.name: i for i, part in enumerate(parts)}
    assert dropped == sorted(dropped, key=lambda row: (order[row["source_file"]], row["step"], row["source_row"]))


# --- nothing twice, nothing in vain ----------------------------------------------------------------------------------


@given(before=INPUTS, after=INPUTS, chain=CHAINS)
@settings(max_examples=20)
def test_every_row_passes_every_step_once_and_what_stays_is_not_read(
    toys: Any, tmp_path_factory: Any, before: Any, after: Any, chain: Any
) -> None:
    output = tmp_path_factory.mktemp("runs") / "1/out"
    toys.forget()
    if isinstance(run(toys, output, parts_of(toys, before), chain), str):
        return
    assert set(Counter(toys.applied).values()) <= {1}
    assert len(toys.applied) == sum(step.rows_in for step in read_manifest(output).steps)
    old = {record["key"] for record in records(output)}
    toys.forget()
    parts = parts_of(toys, after)
    if isinstance(run(toys, output, parts, chain), str):
        return
    assert set(Counter(toys.applied).values()) <= {1}
    new = [record["key"] for record in records(output)]
    stayed = {part.name for part, key in zip(parts, new, strict=True) if key in old}
    assert not stayed & set(toys.read)
    assert not stayed & {row[0] for _, row in toys.applied}


@given(before=INPUTS, after=INPUTS, chain=CHAINS, batch_rows=st.integers(1, 13))
@settings(max_examples=10)
def test_progress_rises_to_all_rows(
    toys: Any, tmp_path_factory: Any, before: Any, after: Any, chain: Any, batch_rows: int
) -> None:
    output = tmp_path_factory.mktemp("runs") / "1/out"
    for inputs in (before, after):
        seen, parts = [], parts_of(toys, inputs)
        made = run(toys, output, parts, chain, batch_rows=batch_rows, progress=seen.append)
        assert seen == sorted(set(seen))
        if isinstance(made, str) or inputs is before or after != before:
            assert seen[-1] == sum(len(part.values) for part in parts)


# --- parts without rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [[], [("without", 2)], [("shift", 4)], [("without", 2), ("shift", 4), ("first", 4)]])
def test_a_part_without_rows_and_one_that_loses_all(toys: Any, tmp_path: Path, chain: Any) -> None:
    parts = [toys.part("a", ()), toys.part("b", (2, 4)), toys.part("c", WITHOUT_END), toys.part("d", ())]
    run(toys, tmp_path / "1/out", parts, chain)
    kept = read_table(tmp_path / "1/out")
    assert read_manifest(tmp_path / "1/out").rows_in == 5
    assert len(kept) + len(read_table(tmp_path / "1/out", "dropped")) == 5
    made = [record["steps"][-1]["rows_out"] if chain else record["rows_in"] for record in records(tmp_path / "1/out")]
    assert [len(record["shards"]) for record in records(tmp_path / "1/out")] == [int(rows > 0) for rows in made]
    toys.forget()
    run(toys, tmp_path / "1/out", [*parts, toys.part("e", (4,))], chain)
    assert set(toys.read) == {"e"}


@pytest.mark.parametrize("chain", [[], [("shift", 4)], [("without", 2), ("first", 4)]])
def test_no_row_at_all(toys: Any, tmp_path: Path, chain: Any) -> None:
    """Of no part, of an empty one, of one whose rows go before the global step."""
    for parts, rows in [([], 0), ([toys.part("a", ())], 0)]:
        with pytest.raises(OrpoError, match=f"^toy: no rows left of {rows} "):
            toys.run(tmp_path / "out", parts, chain)
    with pytest.raises(OrpoError, match=r"^toy: no rows left of 2 \(2 reason_2\)$"):
        toys.run(tmp_path / "out", [toys.part("a", (2, 4))], [("without", 2), *chain])
    assert {path.name for path in tmp_path.iterdir()} <= {".out.notes"}  # which hold for the next run


@pytest.mark.parametrize("values", [(), (2, 4)])
def test_a_global_step_is_asked_even_where_no_row_has_come_to_it(toys: Any, tmp_path: Path, values: Any) -> None:
    """It may have something to say of that: facts, or an error because rows are wanted."""
    chain = toys.chain([("without", 2), ("first", 2)])
    branches = [Branch([], [part], chain, part.name) for part in (toys.part("a", values), toys.part("b", (1,)))]
    with mock.patch("orpo_data.report.write_pages"):
        run_stage("toy", tmp_path / "out", toys.schema, branches)
    assert [step.facts for step in read_manifest(tmp_path / "out").steps] == [{}, {"kept": 0}, {}, {"kept": 1}]
