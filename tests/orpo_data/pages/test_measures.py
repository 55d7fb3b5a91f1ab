"""Figures over all rows, however these lie in shards and however many are looked at together."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from orpo_data.manifest import read_manifest
from orpo_data.pages import rows as pages_rows
from orpo_data.pages.measures import Measures, measure
from orpo_data.pages.rows import read_rows
from orpo_data.schema import JUDGED, TOKENIZED

Make = Callable[..., Any]


def flag(rule: str, side: str) -> dict[str, Any]:
    return {"rule": rule, "side": side, "value": None}


@pytest.fixture
def folder(tmp_path: Path, plain_pair: Make, write_dataset: Make) -> Path:
    """Twenty rows of two sources in two splits, some of them flagged."""
    found: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for n in range(20):
        flags = [flag("urls", "chosen")] * (n % 3 == 0) + [flag("refusal", "rejected")] * (n % 5 == 0)
        values = {"id": f"{n:032x}", "source": "ab"[n % 2], "score_chosen": float(n), "score_rejected": 0.5}
        row = plain_pair("x" * n, **values, model_chosen=f"m{n % 4}", flags=flags)
        found["eval" if n % 6 == 5 else "train"].append(row)
    write_dataset(tmp_path / "d", JUDGED, found)
    return tmp_path / "d"


def figures(folder: Path) -> Measures:
    return measure(read_rows(folder, read_manifest(folder)))


def check(found: Measures) -> None:
    order = [n for n in range(20) if n % 6 != 5] + [5, 11, 17]
    assert found.rows == 20
    assert found.numbers["prompt_characters"].tolist() == order
    assert found.numbers["margin"].tolist() == [n - 0.5 for n in order]
    assert found.sources.cast(pl.String).to_list() == ["ab"[n % 2] for n in order]
    assert found.groups == Counter({("a", None, "train"): 10, ("b", None, "train"): 7, ("b", None, "eval"): 3})
    assert found.models["chosen"] == Counter({f"m{n}": 5 for n in range(4)})
    assert found.flags == Counter({("urls", "chosen"): 7, ("refusal", "rejected"): 4})
    for rule, every in (("urls", 3), ("refusal", 5)):
        assert np.sort(found.flagged_at[rule]).tolist() == [at for at, n in enumerate(order) if n % every == 0]


@pytest.mark.parametrize("at_once", [1, 3, 50_000])
def test_one_shard_a_split(folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(pages_rows, "ROWS_AT_ONCE", at_once)
    check(figures(folder))


@pytest.mark.parametrize("at_once", [1, 3, 50_000])
def test_tokens(tmp_path: Path, write_dataset: Make, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(pages_rows, "ROWS_AT_ONCE", at_once)
    rows = [
        dict.fromkeys(TOKENIZED.names)
        | {"id": f"{n:032x}", "chosen_input_ids": [7] * (5 + n), "rejected_input_ids": [8] * (6 + n % 2)}
        | {"prompt_len": 4, "source": "a", "prompt_turns_dropped": 0}
        | {"chosen_truncated": n == 3, "rejected_truncated": False}
        for n in range(5)
    ]
    write_dataset(tmp_path / "d", TOKENIZED, {"train": rows})
    found = figures(tmp_path / "d")
    assert found.numbers["prompt_tokens"].tolist() == [4] * 5
    assert found.numbers["chosen_tokens"].tolist() == [1, 2, 3, 4, 5]
    assert found.numbers["rejected_tokens"].tolist() == [2, 3, 2, 3, 2]
    assert found.numbers["chosen_truncated"].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("at_once", [1, 3, 50_000])
def test_several_shards_a_split(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(pages_rows, "ROWS_AT_ONCE", at_once)
    folder = request.getfixturevalue("folder")
    assert len(list(folder.glob("train/*.arrow"))) == 3
    check(figures(folder))


@pytest.mark.usefixtures("small_shards")
def test_many_small_shards_are_looked_at_together(request: pytest.FixtureRequest) -> None:
    """One by one each would cost as much as some thousand rows."""
    folder = request.getfixturevalue("folder")
    rows = read_rows(folder, read_manifest(folder))
    assert len(rows.tables) == 4
    assert [len(frame) for frame in rows.frames("id", "source")] == [0, 20]
    assert rows.keys["at"].to_list() == list(range(20))
