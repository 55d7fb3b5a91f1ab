"""What the tests of rules share."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from orpo_data.schema import PAIRS
from orpo_data.steps.rules.rule import Rule, pair_texts


@pytest.fixture(scope="session")
def judge(make_pair: Callable[..., Any]) -> Callable[..., list[tuple[str, str]]]:
    """What a rule finds in one pair: (side, detail) of each finding."""

    def find(rule: Rule, *sides: Any, **columns: Any) -> list[tuple[str, str]]:
        table = pa.Table.from_pylist([make_pair(*sides, **columns)], schema=PAIRS)
        found = rule.judge(pair_texts(table))
        assert set(found["rule"]) <= {rule.name}
        return list(found.select("side", "detail").iter_rows())

    return find
