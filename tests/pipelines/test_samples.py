"""The bundled raw samples: each planted defect is found, and no healthy row is lost to a structural rule."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import orpo_data
from orpo_data.manifest import read_manifest
from pipelines import prepare
from pipelines.quickstart import RECIPE, SAMPLES
from pipelines.recipe import Recipe

FOLDERS = {"ultrafeedback": SAMPLES / "ultrafeedback", "hh-rlhf": SAMPLES / "hh_rlhf"}
Origin = tuple[str, str, int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: Path) -> Path:
    """The quickstart's data part, with a small tokenizer; its many tokens a word ask for longer limits."""
    overrides = [
        f"sources.0.path={FOLDERS['ultrafeedback']}",
        f"sources.1.path={FOLDERS['hh-rlhf']}",
        f"tokenize.tokenizer={chat_tokenizer_dir}",
        "tokenize.max_length=16384",
        "tokenize.max_prompt_length=12288",
    ]
    output = tmp_path_factory.mktemp("samples")
    prepare(Recipe.read(RECIPE, overrides), output)
    return output


@pytest.fixture(scope="module")
def dropped(run: Path) -> dict[Origin, str]:
    """Each dropped row's origin and reason, of all stages."""
    reasons: dict[Origin, str] = {}
    for folder in ("ingest/ultrafeedback", "ingest/hh-rlhf", "binarize", "clean", "split", "tokenize"):
        for row in orpo_data.scan(run / folder, "dropped").collect().to_dicts():
            origin = (row["source"], row["source_file"], row["source_row"])
            assert origin not in reasons
            reasons[origin] = row["reason"]
    return reasons


def planted(source: str) -> list[dict[str, Any]]:
    defects: list[dict[str, Any]] = json.loads((FOLDERS[source] / "_defects.json").read_text())
    return defects


def planted_rows(dropped: bool) -> dict[Origin, str | None]:
    """Origin and reason of the planted rows that must, or need not, go."""
    return {
        (source, item["file"], item["row"]): item["reason"]
        for source in FOLDERS
        for item in planted(source)
        if item["dropped"] is dropped and item["row"] != "all"
    }


def test_every_defect_is_dropped_for_its_reason(dropped):
    expected = planted_rows(dropped=True)
    assert {origin: dropped.get(origin) for origin in expected} == expected


def test_no_other_row_is_dropped(dropped):
    """But those whose fate hangs on the draw or on limits, which are listed as not dropped for certain."""
    listed = planted_rows(dropped=True) | planted_rows(dropped=False)
    assert [origin for origin in dropped if origin not in listed] == []
    by_draw = {origin: reason for origin, reason in dropped.items() if origin not in planted_rows(dropped=True)}
    assert {origin: listed[origin] for origin in by_draw} == by_draw


def test_unusual_layouts_come_through_whole(dropped):
    healthy = [origin for origin, reason in planted_rows(dropped=False).items() if reason is None]
    assert healthy
    assert [origin for origin in healthy if origin in dropped] == []


def test_red_team_attempts_are_never_read(run):
    assert list((FOLDERS["hh-rlhf"] / "red-team-attempts").iterdir())
    names = [item.name for item in read_manifest(run / "ingest" / "hh-rlhf").inputs]
    assert names == [
        f"{subset}/train.jsonl.gz"
        for subset in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
    ]


def test_every_row_of_every_file_is_accounted_for(run, dropped):
    lines = 0
    for source, folder in FOLDERS.items():
        for item in read_manifest(run / "ingest" / source).inputs:
            lines += gzip.decompress((folder / item.name).read_bytes()).count(b"\n")
    assert lines > 400
    assert read_manifest(run / "tokenize").rows + len(dropped) == lines


def test_lists_of_aspects_read_like_single_ones(run):
    """Row 6 and 7 of evol_instruct publish each aspect as a list of one object."""
    rows = orpo_data.scan(run / "ingest" / "ultrafeedback").collect().to_dicts()
    lists = [row for row in rows if row["source_file"] == "evol_instruct.jsonl.gz" and row["source_row"] in (6, 7)]
    assert len(lists) == 2
    assert all(any(completion["honesty"] is not None for completion in row["completions"]) for row in lists)


def test_defects_are_told_in_the_readable_list_too():
    for source in FOLDERS:
        text = (FOLDERS[source] / "DEFECTS.md").read_text()
        for item in planted(source):
            assert f"| {item['file']} | {item['row']} | {item['reason'] or '-'} |" in text
