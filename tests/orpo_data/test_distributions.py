"""How far columns moved: distances worked by hand, and what holds for every pair of samples."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.distributions import NAMES, NUMBERS, kolmogorov_smirnov, shifts, total_variation
from orpo_data.schema import JUDGED, RATED, TOKENIZED

NUMBER_LISTS = st.lists(st.none() | st.integers(-3, 3) | st.floats(-2, 2, width=32), min_size=1)
NAME_LISTS = st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1)


def numbers(values):
    return pl.Series(values, dtype=pl.Float64)


def names(values):
    return pl.Series(values, dtype=pl.String)


@pytest.mark.parametrize(
    ("old", "new", "distance"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 0),
        ([1, 2, 3, 4], [4, 4, 3, 3, 2, 2, 1, 1], 0),  # neither order nor the number of rows counts
        ([1, 2, 3, 4], [3, 4, 5, 6], 0.5),  # up to 2: a half of the old, none of the new
        ([1, 1, 1, 9], [1, 9, 9, 9], 0.5),  # up to 1: three quarters against one
        ([1, 2], [3], 1),
        ([None, None, 1, 2], [1, 2], 0.5),  # below every number: a half against none
        ([0], [None], 1),
    ],
)
def test_kolmogorov_smirnov_by_hand(old, new, distance):
    assert kolmogorov_smirnov(numbers(old), numbers(new)) == distance


@pytest.mark.parametrize(
    ("old", "new", "distance"),
    [
        (["a", "b"], ["b", "a"], 0),
        (["a", "a", "b", "b"], ["a", "b", "b", "b"], 0.25),  # one row in four has another name
        (["a", "b"], ["c", "d"], 1),
        (["a", None], ["a", "a"], 0.5),
    ],
)
def test_total_variation_by_hand(old, new, distance):
    assert total_variation(names(old), names(new)) == distance


@given(NUMBER_LISTS, NUMBER_LISTS)
def test_kolmogorov_smirnov_is_the_largest_gap_between_the_distributions(old, new):
    distance = kolmogorov_smirnov(numbers(old), numbers(new))
    a, b = (np.array([-np.inf if value is None else value for value in values]) for values in (old, new))
    gaps = [abs((a <= x).mean() - (b <= x).mean()) for x in (*a, *b)]
    assert distance == pytest.approx(max(gaps))
    assert distance == kolmogorov_smirnov(numbers(new), numbers(old))


@given(NAME_LISTS, NAME_LISTS)
def test_total_variation_is_the_share_that_would_have_to_change(old, new):
    distance = total_variation(names(old), names(new))
    kept = sum(min(old.count(name) / len(old), new.count(name) / len(new)) for name in {*old, *new})
    assert distance == pytest.approx(1 - kept)
    assert distance == total_variation(names(new), names(old))


def test_every_column_of_figures_is_measured_in_some_table():
    for columns in (NUMBERS, NAMES):
        for name, expression in columns.items():
            wanted = set(expression.meta.root_names()) - {"split"}  # not stored in the rows
            assert any(wanted <= set(schema.names) for schema in (RATED, JUDGED, TOKENIZED)), name


def test_what_moved_most_comes_first_with_its_figures():
    old = pl.LazyFrame({"score_chosen": [1.0, 2, 3, 4], "source": ["a", "a", "b", "b"], "subset": [None] * 4})
    new = pl.LazyFrame({"score_chosen": [3.0, 4, 5, 6], "source": ["a", "b", "b", "b"], "subset": [None] * 4})
    first, second = shifts(old, new)  # what is null throughout is not told
    assert (first.column, first.distance) == ("score_chosen", 0.5)
    assert (first.old["median"], first.old["mean"], first.new["mean"]) == (2.5, 2.5, 4.5)
    assert (second.column, second.distance) == ("source", 0.25)
    assert (second.old, second.new) == ({"a": 0.5, "b": 0.5}, {"a": 0.25, "b": 0.75})


def test_lengths_count_the_characters_of_all_turns_and_the_tokens_of_an_answer(make_pair, make_pairs, turns):
    pairs = make_pairs([make_pair(turns("four", "and", "more"), "Yes.", "No")])
    tokens = pl.LazyFrame(
        {"prompt_len": [3], "chosen_input_ids": [[1, 2, 3, 4, 5]], "rejected_input_ids": [[1, 2, 3, 6]]}
    )
    text = pl.from_arrow(pairs).lazy()
    found = {
        shift.column: shift.new["median"]
        for rows in (text, tokens)
        for shift in shifts(rows, rows)
        if shift.column in NUMBERS
    }
    assert found == {
        "prompt_characters": 11, "chosen_characters": 4, "rejected_characters": 2,
        "prompt_tokens": 3, "chosen_tokens": 2, "rejected_tokens": 1,
    }  # fmt: skip
