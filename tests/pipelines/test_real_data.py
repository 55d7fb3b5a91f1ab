"""The data part over real preference data, in its three shapes, and the shards in others' readers."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

import orpo_data
from orpo_data.manifest import read_manifest
from pipelines import prepare
from pipelines.recipe import Recipe

ROWS = {"ingest/hh-rlhf": 5712, "ingest/ultrafeedback": 700, "ingest/sharegpt": 300}
"""Rows of each source as its README counts them."""

SUBSETS = ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]


@pytest.fixture(scope="module")
def run(real_data: Path, chat_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, prepared once; limits are those of the paper for HH-RLHF."""
    scores = {side: f"metadata.{side}" for side in ("score_chosen", "score_rejected")}
    document: dict[str, Any] = {
        "name": "real",
        "sources": [
            {"dataset": "hh-rlhf", "path": str(real_data / "hh_rlhf")},
            {
                "dataset": "pairs",
                "name": "ultrafeedback",
                "path": str(real_data / "ultrafeedback_binarized"),
                "columns": scores,
            },
            {"dataset": "pairs", "name": "sharegpt", "path": str(real_data / "pairs")},
        ],
        "split": {"eval_fraction": 0.02},
        "tokenize": {"tokenizer": str(chat_tokenizer_dir), "max_length": 1024, "max_prompt_length": 896},
    }
    output = tmp_path_factory.mktemp("real")
    prepare(Recipe.parse(document), output)
    return output


def dropped(folder: Path) -> pl.DataFrame:
    return orpo_data.scan(folder, "dropped").collect()


def reasons(folder: Path, source_file: str) -> Counter[str]:
    return Counter(dropped(folder).filter(pl.col("source_file") == source_file)["reason"].to_list())


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(file)]


@pytest.mark.parametrize("folder", ROWS)
def test_every_record_is_read(run, folder):
    manifest = read_manifest(run / folder)
    assert manifest.rows_in == ROWS[folder]
    assert manifest.rows + sum(manifest.drop_reasons.values()) == ROWS[folder]


def test_every_row_is_accounted_for_to_the_end(run):
    folders = [*ROWS, "binarize", "clean", "split", "tokenize"]
    gone = sum(len(dropped(run / folder)) for folder in folders)
    assert read_manifest(run / "tokenize").rows + gone == sum(ROWS.values())
    assert read_manifest(run / "tokenize").rows > 0.9 * sum(ROWS.values())
    assert all(orpo_data.verify(run / folder).ok for folder in folders)


@pytest.mark.parametrize("subset", SUBSETS)
def test_identical_hh_pairs_are_those_that_are_the_same_text(run, real_data, subset):
    raw = lines_of(real_data / "hh_rlhf" / subset / "test.jsonl.gz")
    same = {i for i, row in enumerate(raw) if row["chosen"] == row["rejected"]}
    gone = dropped(run / "clean").filter(
        (pl.col("source_file") == f"{subset}/test.jsonl.gz") & (pl.col("reason") == "identical_pair")
    )
    # the same text can be dropped for what a rule before says of it, an empty turn for example
    assert set(gone["source_row"].to_list()) <= same
    others = dropped(run / "clean").filter(pl.col("source_file") == f"{subset}/test.jsonl.gz")["source_row"].to_list()
    assert same <= set(others)


def turns_of(transcript: str) -> list[tuple[str, str]]:
    """A second opinion on a transcript's turns, good enough for these files: split at every label."""
    parts = re.split(r"\n\n(Human|Assistant):", transcript)
    return [(role, text.strip()) for role, text in zip(parts[1::2], parts[2::2], strict=True)]


def is_defective(row: dict[str, str]) -> bool:
    chosen, rejected = turns_of(row["chosen"]), turns_of(row["rejected"])
    alternate = all(
        [role for role, _ in turns] == ["Human", "Assistant"] * (len(turns) // 2) for turns in (chosen, rejected)
    )
    empty = any(not text for _, text in (*chosen, *rejected))
    return row["chosen"] == row["rejected"] or chosen[:-1] != rejected[:-1] or empty or not alternate


@pytest.mark.parametrize("subset", SUBSETS)
def test_just_the_defective_hh_pairs_are_dropped(run, real_data, subset):
    raw = lines_of(real_data / "hh_rlhf" / subset / "test.jsonl.gz")
    gone = dropped(run / "clean").filter(pl.col("source_file") == f"{subset}/test.jsonl.gz")["source_row"].to_list()
    assert set(gone) == {i for i, row in enumerate(raw) if is_defective(row)}


def test_hh_reasons(run):
    """Pinned. Where histories differ, a side does not alternate either, and that is said first."""
    found = {subset: reasons(run / "clean", f"{subset}/test.jsonl.gz") for subset in SUBSETS}
    assert found == {
        "harmless-base": {"not_alternating": 8, "empty_turn": 3},
        "helpful-base": {"not_alternating": 7, "empty_turn": 4, "identical_pair": 1},
        "helpful-online": {"ends_with_human": 2, "empty_turn": 3, "identical_pair": 2},
        "helpful-rejection-sampled": {"not_alternating": 2, "identical_pair": 23},
    }


def test_published_ultrafeedback_keeps_its_scores(run, real_data):
    raw = lines_of(real_data / "ultrafeedback_binarized" / "train.jsonl.gz")
    rows = orpo_data.scan(run / "ingest" / "ultrafeedback").collect().to_dicts()
    for row in rows:
        origin = raw[row["source_row"]]
        assert row["score_chosen"] == pytest.approx(origin["metadata"]["score_chosen"])
        assert row["score_rejected"] == pytest.approx(origin["metadata"]["score_rejected"])
        assert row["prompt"][-1]["content"] == origin["prompt"]
        assert row["chosen"] == [{"role": "assistant", "content": origin["chosen"]}]
    found = reasons(run / "clean", "train.jsonl.gz")
    assert found["identical_pair"] > 0
    assert found["empty_turn"] > 0


def test_sharegpt_conversations_become_prompts(run, real_data):
    raw = json.loads(gzip.decompress((real_data / "pairs" / "sharegpt_pairs.json.gz").read_bytes()))
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for row in orpo_data.scan(run / "ingest" / "sharegpt").collect().to_dicts():
        origin = raw[row["source_row"]]
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in origin["conversations"]]
        assert row["prompt"] == turns
        assert row["rejected"] == [{"role": "assistant", "content": origin["rejected"]["value"]}]


def test_hh_turns_put_together_are_the_transcript(run, real_data):
    """Nothing of a transcript is lost or moved between prompt and answer (outer spaces of a turn aside)."""
    labels = {"user": "Human", "assistant": "Assistant"}
    subset = "helpful-online/test.jsonl.gz"
    raw = lines_of(real_data / "hh_rlhf" / subset)
    rows = orpo_data.scan(run / "clean").filter(pl.col("source_file") == subset).collect().to_dicts()
    assert len(rows) > 700
    for row in rows:
        for side in ("chosen", "rejected"):
            told = "".join(f"{labels[turn['role']]}:{turn['content']}" for turn in (*row["prompt"], *row[side]))
            assert "".join(told.split()) == "".join(raw[row["source_row"]][side].split())


def test_no_prompt_is_on_both_sides(run):
    def prompts(split: str) -> set[str]:
        return {json.dumps(prompt) for prompt in orpo_data.load(run / "split", split=split)["prompt"]}

    assert prompts("train") & prompts("eval") == set()
    assert 60 < len(prompts("eval")) < 220


def test_tokens_decode_to_the_text_they_were_made_of(run, chat_tokenizer_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer_dir)
    pairs = {row["id"]: row for row in orpo_data.load(run / "split", split="eval")}
    rows = list(orpo_data.load(run / "tokenize", split="eval"))
    assert len(rows) > 60
    for row in rows:
        pair = pairs[row["id"]]
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_input_ids"]
            assert len(ids) <= 1024
            if not row[f"{side}_truncated"] and not row["prompt_turns_dropped"]:
                text = tokenizer.apply_chat_template([*pair["prompt"], *pair[side]], tokenize=False)
                assert tokenizer.decode(ids).strip() == text.strip()
                assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("folder", ["split", "tokenize"])
def test_others_readers_see_the_same_rows(run, folder):
    import datasets

    ours = orpo_data.load(run / folder, split="train")
    theirs = datasets.load_from_disk(str(run / folder))
    assert set(theirs) == {"train", "eval"}
    table = pa.concat_tables(
        pa.ipc.open_stream(pa.memory_map(str(shard))).read_all()
        for shard in sorted((run / folder / "train").glob("*.arrow"))
    )
    frame = orpo_data.scan(run / folder, "train").collect()
    assert theirs["train"].num_rows == table.num_rows == frame.height == len(ours) > 6000
    rows = table.to_pylist()
    assert frame.to_dicts() == rows
    assert theirs["train"].to_list() == rows
    assert theirs["train"].cache_files  # memory-mapped, not copied
