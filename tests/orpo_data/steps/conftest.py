"""Global steps without a stage: notes on parts in batches, one judgement, verdicts applied in batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest

from orpo_data.steps.step import GlobalStep


@dataclass(frozen=True)
class Outcome:
    """What a global step made of all parts."""

    kept: pa.Table
    dropped: pa.Table
    flagged: dict[str, int]
    facts: dict[str, Any]


def _batches(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    yield from (table.slice(start, rows) for start in range(0, len(table), rows))


def _written(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables as they come back from a file, batch by batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def _run_global(step: GlobalStep, parts: Sequence[pa.Table], batch: int = 100) -> Outcome:
    parts = [part for part in parts if len(part)] or parts[:1]
    noted = [_written([step.note(rows) for rows in _batches(part, batch)] or [step.note(part)]) for part in parts]
    for part, notes in zip(parts, noted, strict=True):
        assert batch >= len(part) or notes.equals(step.note(part))
    judgement = step.judge(noted)
    outputs = []
    for part, verdicts in zip(parts, (_written([table]) for table in judgement.verdicts), strict=True):
        batches = zip(_batches(part, batch), _batches(verdicts, batch), strict=True)
        outputs += [step.apply(*both) for both in batches] or [step.apply(part, verdicts)]
    flagged: dict[str, int] = {}
    for output in outputs:
        for rule, rows in output.flagged.items():
            flagged[rule] = flagged.get(rule, 0) + rows
    kept, dropped = (pa.concat_tables(getattr(output, name) for output in outputs) for name in ("kept", "dropped"))
    assert len(kept) + len(dropped) == sum(map(len, parts))
    return Outcome(kept, dropped, flagged, judgement.facts)


@pytest.fixture(scope="session")
def run_global() -> Callable[..., Outcome]:
    """`run_global(step, parts, batch=100)`."""
    return _run_global
