"""The learning rate's course, by hand and in its bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orpo_train.config import TrainConfig
from orpo_train.schedule import DECAYS, learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + math.sqrt(1 / 2)) / 2, 1 / 2, (1 - math.sqrt(1 / 2)) / 2]),
        ("inverse_sqrt", [1 / 3, 2 / 3, 1, math.sqrt(2 / 3), math.sqrt(2 / 4), math.sqrt(2 / 5)]),
    ],
)
def test_six_steps_with_two_of_warmup(schedule: str, expected: list[float]) -> None:
    assert [learning_rate_factor(schedule, step, 2, 6) for step in range(6)] == pytest.approx(expected)


@given(st.sampled_from(sorted(DECAYS)), st.integers(1, 300), st.data())
def test_rises_then_never_rises_and_stays_in_bounds(schedule: str, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    factors = [learning_rate_factor(schedule, step, warmup, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors), "no step is for nothing"
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    if warmup < total:
        assert factors[warmup] == 1


def test_warmup_of_a_config() -> None:
    assert TrainConfig(model="m").warmup(100) == 10
    assert TrainConfig(model="m", warmup_ratio=0.5, warmup_steps=3).warmup(100) == 3
    assert TrainConfig(model="m", warmup_ratio=0.0).warmup(100) == 0
    with pytest.raises(ValidationError, match=r"warmup_steps \(5\) is more than max_steps \(4\)"):
        TrainConfig(model="m", warmup_steps=5, max_steps=4)


def test_lambda_is_the_key() -> None:
    assert TrainConfig.model_validate({"model": "m", "lambda": 0.3}).lambda_ == 0.3
