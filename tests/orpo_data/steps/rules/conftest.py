"""What the tests of rules share."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from orpo_data.schema import PAIRS
from orpo_data.steps.rules.judge import judge
from orpo_data.steps.rules.rule import Rule, rows_to_judge


@pytest.fixture(scope="session", name="judge")
def judge_pair(make_pair: Callable[..., Any]) -> Callable[..., list[tuple[str, str]]]:
    """What a rule finds in one pair: (side, detail) of each finding."""

    def find(rule: Rule, *sides: Any, **columns: Any) -> list[tuple[str, str]]:
        table = pa.Table.from_pylist([make_pair(*sides, **columns)], schema=PAIRS)
        found = judge([rule], rows_to_judge(table))
        assert set(found["rule"]) <= {rule.name}
        return list(found.select("side", "detail").iter_rows())

    return find
