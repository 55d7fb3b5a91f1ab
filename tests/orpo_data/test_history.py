"""The chain back to the raw files, and a row's way along it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import orpo_data
from orpo_data.errors import OrpoError, UsageError
from orpo_data.history import Origin, RowLineage
from orpo_data.shards import read_table
from orpo_data.steps.binarize import Binarize
from orpo_data.steps.draws import draw
from pipelines import prepare, stages
from pipelines.layout import Layout

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
    assert [[verdict.step for verdict in d.steps] for d in found.decisions[-2:]] == [
        ["split"],
        ["chat_template", "tokenize", "truncate"],
    ]
    assert all(verdict.kept for d in found.decisions for verdict in d.steps)
    assert found.decisions[-1].steps[-1].values == {
        "chosen_input_tokens": len(row["chosen_input_ids"]),
        "rejected_input_tokens": len(row["rejected_input_ids"]),
        "prompt_len": row["prompt_len"],
        "prompt_turns_dropped": row["prompt_turns_dropped"],
        "chosen_truncated": row["chosen_truncated"],
        "rejected_truncated": row["rejected_truncated"],
    }


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
        (binarized,) = found.decisions[1].steps
        assert binarized.values["model_chosen"] == "gpt-4"
        assert [round(answer["score"], 3) for answer in binarized.values["scores"]] == [3, 4.667, 2.667, 1.25]


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
    *passed, fell = last.steps
    assert all(verdict.kept for verdict in passed)
    assert [verdict.step for verdict in passed] == (["chat_template", "tokenize"] if step == "truncate" else [])
    assert (fell.step, fell.kept, fell.reason, fell.detail) == (step, False, reason, dropped["detail"])
    stages = [path.split("/")[0] for path in CHAIN[1:]]
    assert [d.stage for d in found.decisions] == stages[: stages.index(stage) + 1]


def test_too_little_of_an_id_is_told_so(prepared: Path) -> None:
    with pytest.raises(UsageError, match=r"^row '': \d+ ids begin so, give more of it$"):
        orpo_data.lineage(prepared / "tokenize", "")


def test_every_third_row_ever_parsed_has_a_story(prepared: Path) -> None:
    for source in CHAIN[:2]:
        for row_id in read_table(prepared / source)["id"].to_pylist()[::3]:
            (found,) = orpo_data.lineage(prepared / "tokenize", row_id).rows
            assert found.decisions[0].stage == "ingest"
            assert found.decisions[-1].stage == "tokenize" or not found.decisions[-1].kept


def test_two_records_with_one_content_are_two_stories(
    tmp_path: Path, make_recipe: Callable[..., Any], own_raw_data: Path
) -> None:
    lines = (own_raw_data / "hh/train.jsonl").read_text().splitlines()
    (own_raw_data / "hh/train.jsonl").write_text("\n".join([lines[0], lines[1], lines[0]]))
    recipe = make_recipe(raw=own_raw_data)
    stages.ingest(recipe.sources[0], recipe, tmp_path / "out")
    row_id = read_table(tmp_path / "out")["id"][0].as_py()
    found = orpo_data.lineage(tmp_path / "out", row_id).rows
    assert sorted(row.origin.row for row in found) == [0, 2]
    assert [len(row.decisions) for row in found] == [1, 1]


# --- which values decided --------------------------------------------------------------------------------------------


def values(row: RowLineage, step: str) -> list[dict[str, Any]]:
    return [verdict.values for decision in row.decisions for verdict in decision.steps if verdict.step == step]


def test_the_scores_and_the_draw_that_picked_the_rejected_answer(prepared: Path) -> None:
    """Ratings 3333, 554-, 2-33 and 1112 of four models: the second is best, the draw is among the other three."""
    (row,) = orpo_data.lineage(prepared / "binarize", file="evol_instruct.jsonl", line=4).rows
    (told,) = values(row, "binarize")
    models = ["alpaca-7b", "gpt-4", "llama-2-7b-chat", "falcon-40b-instruct"]
    assert [answer["model"] for answer in told["scores"]] == models
    assert [answer["score"] for answer in told["scores"]] == pytest.approx([3, 14 / 3, 8 / 3, 1.25])
    rated = origin_row(prepared / "ingest/ultrafeedback", None, source_row=3)
    lower = [models[0], *models[2:]]
    picked = draw(42, "binarize", rated["id"]) % 3
    assert told["drawn"] == f"{picked + 1} of 3"
    assert told["model_rejected"] == lower[picked]


def test_the_scores_of_a_prompt_that_was_dropped(prepared: Path) -> None:
    (row,) = orpo_data.lineage(prepared / "tokenize", file="evol_instruct.jsonl", line=21).rows
    (told,) = values(row, "binarize")
    assert [answer["score"] for answer in told["scores"]] == [4, 4]
    assert row.decisions[-1].reason == "tie"


def test_a_step_of_another_version_is_not_asked(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Binarize, "version", -1)
    (row,) = orpo_data.lineage(prepared / "binarize", file="evol_instruct.jsonl", line=4).rows
    assert set(values(row, "binarize")[0]) == {"score_chosen", "score_rejected", "model_chosen", "model_rejected"}


def test_the_draw_of_a_group_decides_the_side(prepared: Path) -> None:
    for row in read_table(prepared / "split").to_pylist()[::7]:
        (found,) = orpo_data.lineage(prepared / "split", row["id"]).rows
        (told,) = values(found, "split")
        assert (found.decisions[-1].split == "eval") == (told["draw"] < told["eval_below"])
        assert told["eval_below"] == 0.2


def test_the_draw_of_a_sample_decides(prepared: Path, tmp_path: Path, make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe("sources.1.weight=0.5")
    stages.binarize([prepared / stage for stage in CHAIN[:2]], recipe, tmp_path / "binarize")
    drawn = set()
    for row in orpo_data.lineage(tmp_path / "binarize", file="evol_instruct.jsonl").ends.iter_rows(named=True):
        for found in orpo_data.lineage(tmp_path / "binarize", row["id"]).rows:
            for told in values(found, "sample"):
                assert (row["reason"] == "not_sampled") == (told["draw"] >= told["share"] == 0.5)
                drawn.add(row["reason"])
    assert drawn == {None, "not_sampled"}


def test_flags_and_noise_come_with_their_values(
    prepared: Path, tmp_path: Path, make_recipe: Callable[..., Any]
) -> None:
    recipe = make_recipe("clean.length_ratio={action: flag, at_most: 1.1}", "label_noise={}", "normalise={}")
    stages.clean(prepared / "binarize", recipe, tmp_path / "clean")
    row = origin_row(tmp_path / "clean", None, source="ultrafeedback", source_row=3)
    (found,) = orpo_data.lineage(tmp_path / "clean", row["id"]).rows
    assert values(found, "clean") == [{"flags": row["flags"]}]
    assert row["flags"][0]["rule"] == "length_ratio"
    assert values(found, "label_noise") == [{"label_noise": row["label_noise"]}]
    assert values(found, "normalise") == [{"changed": False}]
    assert [v.step for v in found.decisions[-1].steps] == ["normalise", "clean", "label_noise"]


def test_one_record_that_made_several_pairs_tells_each(
    tmp_path: Path, make_recipe: Callable[..., Any], prepared: Path
) -> None:
    recipe = make_recipe("binarize.rejected=all", "clean.length_ratio={action: drop, at_most: 1.9}")
    place = Layout(tmp_path)
    stages.binarize([prepared / stage for stage in CHAIN[:2]], recipe, place.binarize)
    stages.clean(place.binarize, recipe, place.clean)
    (row,) = orpo_data.lineage(place.clean, file="evol_instruct.jsonl", line=4).rows
    assert [d.stage for d in row.decisions] == ["ingest", *["binarize"] * 3, *["clean"] * 3]
    assert {d.id for d in row.decisions[1:4]} == {d.id for d in row.decisions[4:]}
    assert sorted(d.reason or "" for d in row.decisions[4:]) == ["", "length_ratio", "length_ratio"]


@pytest.fixture(scope="module")
def deduped(raw_data: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Any]) -> Path:
    """Dialogue 0 stands again in lines 49 and 50, and dialogue 1 the other way round in line 51."""
    root = tmp_path_factory.mktemp("deduped")
    lines = (raw_data / "hh/train.jsonl").read_text().splitlines()
    other = json.loads(lines[1])
    turned = json.dumps({"chosen": other["rejected"], "rejected": other["chosen"]})
    (root / "train.jsonl").write_text("\n".join([*lines, lines[0], lines[0], turned]) + "\n")
    prepare(make_recipe(f"sources=[{{dataset: hh-rlhf, path: '{root}'}}]", "dedup={near: null}"), root / "run")
    return root / "run"


def test_a_duplicate_leads_to_the_row_it_was_removed_for(deduped: Path) -> None:
    """All three copies have one id: it is the place that tells them apart."""
    for line in (49, 50):
        (row,) = orpo_data.lineage(deduped / "tokenize", file="train.jsonl", line=line).rows
        assert row.decisions[-1].reason == "duplicate_pair"
        (kept,) = row.related
        assert kept.origin == Origin("hh-rlhf", "train.jsonl", 0)
        assert kept.decisions[-1].stage == "tokenize"
        assert kept.decisions[-1].kept
        assert kept.related == ()


def test_the_copy_that_was_kept_need_not_be_the_first(tmp_path: Path, make_recipe: Callable[..., Any]) -> None:
    """That with the widest margin is."""
    rows = [
        {"prompt": "Q?", "chosen": "A.", "rejected": "B.", "score_chosen": s, "score_rejected": 0} for s in (1, 3, 2)
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    sources = f"sources=[{{dataset: pairs, path: {tmp_path / 'p.json'}}}]"
    reports = prepare(make_recipe(sources, "dedup={}", "split.eval_fraction=0"), tmp_path / "run")
    for line in (1, 3):
        (row,) = orpo_data.lineage(reports[-1].path, file="p.json", line=line).rows
        assert [other.origin.line for other in row.related] == [2]


def test_rows_that_contradict_each_other_do_not_go_round_in_circles(deduped: Path) -> None:
    (row,) = orpo_data.lineage(deduped / "tokenize", file="train.jsonl", line=2).rows
    (other,) = row.related
    assert (row.decisions[-1].reason, other.decisions[-1].reason) == ("contradiction", "contradiction")
    assert other.origin.line == 51
    assert other.related == ()


def test_a_copy_that_was_kept_is_not_told_twice(deduped: Path, tmp_path: Path, make_recipe: Callable[..., Any]) -> None:
    """Token ids carry no origin: copies show the same rows there."""
    recipe = make_recipe()
    place = Layout(tmp_path / "lax")
    stages.clean(deduped / "binarize", recipe, place.clean)
    stages.split(place.clean, recipe, place.split)
    stages.tokenize(place.split, recipe, place.tokenize)
    (row,) = orpo_data.lineage(place.tokenize, file="train.jsonl", line=50).rows
    assert [d.stage for d in row.decisions] == ["ingest", "binarize", "clean", "split", "tokenize"]


# --- from a raw file on ----------------------------------------------------------------------------------------------


def test_where_every_row_of_a_file_ended(prepared: Path) -> None:
    for stage in CHAIN[1:]:
        nodes = orpo_data.lineage(prepared / stage).nodes
        ends = orpo_data.lineage(prepared / stage, file="evol_instruct.jsonl").ends
        assert ends is not None
        assert ends["source_row"].to_list() == list(range(23)), "each record made one row"
        kept = ends.filter(pl.col("step").is_null())
        own = orpo_data.scan(prepared / stage).filter(pl.col("source") == "ultrafeedback").select("id").collect()
        assert sorted(kept["id"]) == sorted(own["id"])
        fallen = [
            fall
            for node in nodes
            for fall in read_table(node.path, "dropped").to_pylist()
            if fall["source"] == "ultrafeedback"
        ]
        told = ends.filter(pl.col("step").is_not_null()).select("source_row", "step", "reason", "detail").rows()
        assert sorted(told) == sorted(tuple(f[n] for n in ("source_row", "step", "reason", "detail")) for f in fallen)


def test_a_file_says_in_which_split_its_rows_are(prepared: Path) -> None:
    for stage in ("split", "tokenize"):
        ends = orpo_data.lineage(prepared / stage, file="train.jsonl").ends
        assert ends is not None
        for split in ("train", "eval"):
            ids = set(read_table(prepared / stage, split)["id"].to_pylist())
            assert set(ends.filter(pl.col("split") == split)["id"]) == {i for i in ids if i in set(ends["id"])}
        assert ends.filter(pl.col("split").is_not_null())["reason"].is_null().all()


def test_a_record_that_could_not_be_parsed_has_a_line(prepared: Path) -> None:
    (row,) = orpo_data.lineage(prepared / "tokenize", file="train.jsonl", line=41).rows
    assert (row.id, row.origin.line) == (None, 41)
    (decision,) = row.decisions
    assert (decision.stage, decision.step, decision.reason) == ("ingest", "parse", "unparsable")
    assert decision.steps[0].detail is not None


def test_a_file_by_a_longer_path(prepared: Path, raw_data: Path) -> None:
    ends = orpo_data.lineage(prepared / "ingest/hh-rlhf", file=str(raw_data / "hh/train.jsonl")).ends
    assert ends is not None
    assert len(ends) == 48


@pytest.mark.parametrize(
    ("wanted", "error", "says"),
    [
        ({"file": "nope.jsonl"}, OrpoError, r"no raw file 'nope.jsonl' .* there are evol_instruct.jsonl, train.jsonl"),
        ({"file": "train.jsonl", "line": 99}, OrpoError, "no row of .* came from line 99 of 'train.jsonl'"),
        ({"file": "train.jsonl", "row": "a"}, UsageError, "ask for a row, or for a file"),
        ({"line": 3}, UsageError, "ask for a row, or for a file"),
    ],
)
def test_a_file_that_is_not_there(prepared: Path, wanted: Any, error: type[OrpoError], says: str) -> None:
    with pytest.raises(error, match=says):
        orpo_data.lineage(prepared / "tokenize", **wanted)


def test_a_dataset_on_its_own_knows_no_raw_files(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "tokenize", tmp_path / "tokenize")
    with pytest.raises(OrpoError, match="what it was made of is not beside it any more"):
        orpo_data.lineage(tmp_path / "tokenize", file="train.jsonl")


# --- bad input -------------------------------------------------------------------------------------------------------


def test_no_such_row(prepared: Path) -> None:
    with pytest.raises(OrpoError, match=r"^no row with id 'beef' in .*tokenize or in any dataset it was made of$"):
        orpo_data.lineage(prepared / "tokenize", "beef")


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(OrpoError, match="not a dataset folder"):
        orpo_data.lineage(tmp_path)


def test_a_story_is_plain_json(prepared: Path) -> None:
    (found,) = orpo_data.lineage(prepared / "tokenize", read_table(prepared / "tokenize")["id"][0].as_py()).rows
    assert json.loads(json.dumps(dataclasses.asdict(found), default=str))["origin"] == dataclasses.asdict(found.origin)
