"""A source gives the share or the number of rows that was asked for, always the same ones."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_data.errors import OrpoError
from orpo_data.schema import PAIRS
from orpo_data.steps.sample import Sample, Take


def rows(numbers: list[int]) -> pa.Table:
    """Every third row has the content, and so the id, of the one before."""
    records = [
        dict.fromkeys(PAIRS.names)
        | {"id": f"{number - (number % 3 == 2):032x}", "source_file": "f", "source_row": number}
        for number in numbers
    ]
    return pa.Table.from_pylist(records, schema=PAIRS)


@pytest.fixture(scope="session")
def taken(run_global: Any) -> Callable[..., list[int]]:
    """The rows that are taken, in parts of some rows each."""

    def taken(numbers: list[int], count: int, batch: int = 100, part: int = 100, seed: int = 42) -> list[int]:
        table = rows(numbers)
        parts = [table.slice(start, part) for start in range(0, max(1, len(table)), part)]
        out = run_global(Take(count=count, seed=seed, source="talk"), parts, batch)
        assert out.dropped["reason"].to_pylist() == ["not_sampled"] * (len(numbers) - count)
        return out.kept["source_row"].to_pylist()

    return taken


numbers = st.lists(st.integers(0, 60), unique=True, min_size=1, max_size=40)


@settings(max_examples=40)
@given(numbers, st.data())
def test_exactly_that_many_rows_in_any_order(taken: Any, numbers: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(numbers)))
    kept = taken(numbers, count)
    assert len(kept) == count
    assert kept == [number for number in numbers if number in kept]
    order = data.draw(st.permutations(numbers))
    assert sorted(taken(order, count, *data.draw(st.tuples(st.integers(1, 5), st.integers(1, 9))))) == sorted(kept)


@settings(max_examples=40)
@given(numbers, numbers, st.data())
def test_more_rows_displace_only_as_many_as_they_are(
    taken: Any, old: list[int], new: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(old)))
    both = sorted({*old, *new})
    before, after = set(taken(old, count)), set(taken(both, count))
    assert after & set(old) <= before
    assert set(taken(old, min(count + 1, len(old)))) >= before


def test_of_rows_with_one_content_the_first_by_origin(taken: Any) -> None:
    for order in ([1, 2], [2, 1]):
        assert taken(order, 1) == [1]
    order = list(range(30))
    assert [len(taken(order, count)) for count in order[1:]] == order[1:]


def test_the_seed_decides(taken: Any) -> None:
    assert len({tuple(taken(list(range(30)), 5, seed=seed)) for seed in range(20)}) > 15


def test_more_than_there_are(taken: Any) -> None:
    with pytest.raises(OrpoError, match=r"^source 'talk': count asks for 6 pairs, there are 5$"):
        taken(list(range(5)), 6)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share(share: float) -> None:
    table = rows(list(range(0, 3000, 3)))
    output = Sample(share=share).apply(table)
    assert abs(len(output.kept) / 1000 - share) < 0.05
    assert set(output.dropped["reason"].to_pylist()) <= {"not_sampled"}
    halves = [Sample(share=share).apply(table.slice(start, 500)).kept for start in (0, 500)]
    assert pa.concat_tables(halves).equals(output.kept)
