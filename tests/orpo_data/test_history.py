"""The chain back to the raw files, and a row's way along it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orpo_data
from orpo_data.errors import OrpoError
from orpo_data.history import Decision, Origin, RowLineage
from orpo_data.shards import read_table

CHAIN = ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"]


def way(row: RowLineage) -> list[tuple[str, bool, str | None, str | None, str | None]]:
    return [(d.stage, d.kept, d.split, d.step, d.reason) for d in row.decisions]


def origin_row(folder: Path, split: str | None, **match: Any) -> dict[str, Any]:
    """The one row of a dataset with these values."""
    (row,) = [r for r in read_table(folder, split).to_pylist() if all(r[k] == v for k, v in match.items())]
    return row


@pytest.mark.parametrize("end", range(len(CHAIN)))
def test_the_chain_ends_in_the_dataset_asked_for(prepared: Path, end: int) -> None:
    nodes = orpo_data.lineage(prepared / CHAIN[end]).nodes
    expected = [CHAIN[end]] if end < 2 else CHAIN[: end + 1]
    assert [node.path for node in nodes] == [prepared / stage for stage in expected]
    assert all(node.sound for node in nodes)
    assert orpo_data.lineage(prepared / CHAIN[end]).rows == ()
    assert [item.name for item in nodes[0].manifest.inputs] == [["train.jsonl"], ["evol_instruct.jsonl"]][end == 1]


def test_the_chain_moves_with_its_folder(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "moved")
    assert [node.path for node in orpo_data.lineage(tmp_path / "moved/tokenize").nodes] == [
        tmp_path / "moved" / s for s in CHAIN
    ]


def test_the_chain_from_a_relative_path(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared)
    assert [node.path for node in orpo_data.lineage("tokenize").nodes] == [Path(stage) for stage in CHAIN]


def test_an_input_that_is_no_longer_what_was_read(
    prepared: Path, tmp_path: Path, make_recipe: Callable[..., Any]
) -> None:
    from pipelines import stages

    shutil.copytree(prepared, tmp_path / "run")
    stages.split(tmp_path / "run/clean", make_recipe("split.seed=1"), tmp_path / "run/split")
    nodes = orpo_data.lineage(tmp_path / "run/tokenize").nodes
    assert [node.path.name for node in nodes if not node.sound] == ["split"]


def test_a_row_that_was_kept(prepared: Path) -> None:
    row = origin_row(prepared / "tokenize", "train", id=read_table(prepared / "tokenize", "train")["id"][0].as_py())
    (found,) = orpo_data.lineage(prepared / "tokenize", row["id"]).rows
    clean = origin_row(prepared / "clean", None, id=row["id"])
    assert found.origin == Origin(clean["source"], clean["source_file"], clean["source_row"])
    assert way(found) == [
        ("ingest", True, None, None, None),
        ("binarize", True, None, None, None),
        ("clean", True, None, None, None),
        ("split", True, "train", None, None),
        ("tokenize", True, "train", None, None),
    ]
    assert found.decisions[-1] == Decision(
        stage="tokenize",
        path=prepared / "tokenize",
        id=row["id"],
        kept=True,
        split="train",
        step=None,
        reason=None,
        detail={
            "prompt_len": row["prompt_len"],
            "prompt_turns_dropped": row["prompt_turns_dropped"],
            "chosen_truncated": row["chosen_truncated"],
            "rejected_truncated": row["rejected_truncated"],
            "chosen_tokens": len(row["chosen_input_ids"]),
            "rejected_tokens": len(row["rejected_input_ids"]),
        },
    )


def test_a_rated_prompt_and_the_pair_made_of_it_tell_one_story(prepared: Path) -> None:
    """The prompt's id differs from the pair's: either leads to the same record."""
    rated = origin_row(prepared / "ingest/ultrafeedback", None, source_row=3)
    pair = origin_row(prepared / "binarize", None, source="ultrafeedback", source_row=3)
    assert rated["id"] != pair["id"]
    for row_id in (rated["id"], pair["id"]):
        (found,) = orpo_data.lineage(prepared / "tokenize", row_id).rows
        assert found.origin == Origin("ultrafeedback", "evol_instruct.jsonl", 3)
        assert [d.stage for d in found.decisions] == ["ingest", "binarize", "clean", "split", "tokenize"]
        assert [d.id for d in found.decisions] == [rated["id"]] + [pair["id"]] * 4
        assert found.decisions[1].detail["model_chosen"] == "gpt-4"


@pytest.mark.parametrize(
    ("stage", "step", "reason"),
    [
        ("binarize", "binarize", "tie"),
        ("clean", "clean", "identical_pair"),
        ("tokenize", "chat_template", "control_token_in_text"),
        ("tokenize", "truncate", "prompt_too_long"),
    ],
)
def test_a_row_that_was_dropped(prepared: Path, stage: str, step: str, reason: str) -> None:
    dropped = origin_row(prepared / stage, "dropped", reason=reason)
    (found,) = orpo_data.lineage(prepared / "tokenize", dropped["id"][:12]).rows
    assert found.id == dropped["id"]
    assert found.origin == Origin(dropped["source"], dropped["source_file"], dropped["source_row"])
    *before, last = found.decisions
    assert all(decision.kept for decision in before)
    assert (last.stage, last.kept, last.step, last.reason) == (stage, False, step, reason)
    assert last.detail == {"detail": dropped["detail"]}
    stages = [path.split("/")[0] for path in CHAIN[1:]]
    assert [d.stage for d in found.decisions] == stages[: stages.index(stage) + 1]


def test_every_row_ever_parsed_has_a_story(prepared: Path) -> None:
    for source in CHAIN[:2]:
        for row_id in read_table(prepared / source)["id"].to_pylist():
            (found,) = orpo_data.lineage(prepared / "tokenize", row_id).rows
            assert found.decisions[0].stage == "ingest"
            assert found.decisions[-1].stage == "tokenize" or not found.decisions[-1].kept


def test_two_records_with_one_content_are_two_stories(
    tmp_path: Path, make_recipe: Callable[..., Any], own_raw_data: Path
) -> None:
    from pipelines import stages

    lines = (own_raw_data / "hh/train.jsonl").read_text().splitlines()
    (own_raw_data / "hh/train.jsonl").write_text("\n".join([lines[0], lines[1], lines[0]]))
    recipe = make_recipe(raw=own_raw_data)
    stages.ingest(recipe.sources[0], recipe, tmp_path / "out")
    row_id = read_table(tmp_path / "out")["id"][0].as_py()
    found = orpo_data.lineage(tmp_path / "out", row_id).rows
    assert sorted(row.origin.row for row in found) == [0, 2]
    assert [len(row.decisions) for row in found] == [1, 1]


def test_no_such_row(prepared: Path) -> None:
    with pytest.raises(OrpoError, match=r"^no row with id 'beef' in .*tokenize or in any dataset it was made of$"):
        orpo_data.lineage(prepared / "tokenize", "beef")


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(OrpoError, match="not a dataset folder"):
        orpo_data.lineage(tmp_path)


def test_a_story_is_plain_json(prepared: Path) -> None:
    (found,) = orpo_data.lineage(prepared / "tokenize", read_table(prepared / "tokenize")["id"][0].as_py()).rows
    assert json.loads(json.dumps(dataclasses.asdict(found), default=str))["origin"] == dataclasses.asdict(found.origin)
