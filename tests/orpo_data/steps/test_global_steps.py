"""What holds for every step that looks at the whole dataset."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest

from orpo_data.steps.clean import Clean
from orpo_data.steps.dedup import Dedup
from orpo_data.steps.label_noise import LabelNoise
from orpo_data.steps.sample import Take
from orpo_data.steps.split import Split
from orpo_data.steps.step import GlobalStep

STEPS = [Dedup(), Dedup(on="prompt", near=None), LabelNoise(flag_above=0.1), Split(eval_fraction=0.3)]
every_step = pytest.mark.parametrize("step", [*STEPS, Take(count=1, source="talk")], ids=lambda step: repr(step)[:24])


@pytest.fixture(scope="module")
def rows(make_pairs: Callable[..., pa.Table], make_pair: Callable[..., Any]) -> pa.Table:
    more = [make_pair("Why?", "\u2018Oak\u2019, caf\u00e9!", "\u6771\u4eac", source_row=number) for number in range(3)]
    return Clean(ties="off").apply(pa.concat_tables([make_pairs(40), make_pairs(more)])).kept


@every_step
def test_threads_may_share_a_step(step: GlobalStep, rows: pa.Table) -> None:
    parts = [rows.slice(start, 5) for start in range(0, len(rows), 5)]
    with ThreadPoolExecutor(4) as pool:
        notes = list(pool.map(step.note, parts))
        assert pa.concat_tables(notes).equals(step.note(rows))
        verdicts = step.judge(notes).verdicts
        outputs = list(pool.map(step.apply, parts, verdicts))
    kept = pa.concat_tables([output.kept for output in outputs])
    assert kept.equals(step.apply(rows, step.judge([step.note(rows)]).verdicts[0]).kept)


@every_step
def test_the_order_of_parts_decides_nothing(step: GlobalStep, rows: pa.Table) -> None:
    notes = [step.note(rows.slice(start, 9)) for start in range(0, len(rows), 9)]
    there, back = step.judge(notes), step.judge(notes[::-1])
    assert there.facts == back.facts
    for verdicts, again, part in zip(there.verdicts, back.verdicts[::-1], notes, strict=True):
        assert verdicts.equals(again)
        assert len(verdicts) == len(part)


@every_step
def test_no_rows(step: GlobalStep, rows: pa.Table) -> None:
    empty = rows.slice(0, 0)
    if isinstance(step, Take):
        return
    assert len(step.note(empty)) == 0
    assert step.note(empty).schema == step.note(rows).schema
    (verdicts,) = step.judge([step.note(empty)]).verdicts
    assert (
        step.apply(empty, verdicts).kept.schema
        == step.apply(rows, step.judge([step.note(rows)]).verdicts[0]).kept.schema
    )
    assert step.judge([]).verdicts == []
