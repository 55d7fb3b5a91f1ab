"""The stage `clean` with all its own steps on, from a recipe: the chain, the counts in the manifest, the bytes."""

import json
from collections import Counter

import pytest

from orpo_data.manifest import read_manifest
from orpo_data.schema import JUDGED, pair_id
from orpo_data.shards import read_table
from orpo_data.verification import verify
from pipelines import stages

EVERYTHING = [
    "normalise={redact: [email, phone, ip, secret]}",
    "clean={ties: flag, identical_pair: flag, refusal: flag, boilerplate: flag, personal_data: flag, too_short: flag,"
    " repetition: {action: flag, at_most: 0.1}, length_ratio: {action: drop, at_most: 50}, low_margin: flag}",
    "label_noise={flag_above: 0.2}",
]


@pytest.fixture
def cleaned(prepared, make_recipe, tmp_path):
    def run(*overrides, name="clean", batch_rows=1000):
        stages.clean(prepared / "binarize", make_recipe(*overrides), tmp_path / name, batch_rows=batch_rows)
        return tmp_path / name

    return run


@pytest.mark.parametrize(
    ("overrides", "chain"),
    [
        ([], ["clean"]),
        (["normalise={}"], ["normalise", "clean"]),
        (["label_noise={}"], ["clean", "label_noise"]),
        (["normalise={}", "label_noise={}", "dedup={}"], ["normalise", "clean", "dedup", "label_noise"]),
    ],
)
def test_sections_that_are_left_out_are_no_steps(cleaned, overrides, chain):
    assert [step.step for step in read_manifest(cleaned(*overrides)).steps] == chain


def test_counts_are_those_of_the_rows(cleaned, prepared):
    folder = cleaned(*EVERYTHING)
    rows = read_table(folder).to_pylist()
    normalise, clean, label_noise = read_manifest(folder).steps
    found = Counter(flag["rule"] for row in rows for flag in row["flags"])
    assert clean.flagged | label_noise.flagged == found
    assert found["identical_pair"] == 1
    assert found["label_noise"] >= 1
    before = {(row["source"], row["source_row"]): row["id"] for row in read_table(prepared / "binarize").to_pylist()}
    changed = [row for row in rows if before[row["source"], row["source_row"]] != row["id"]]
    assert normalise.changed >= len(changed)
    assert all(row["id"] == pair_id(row["prompt"], row["chosen"], row["rejected"]) for row in rows)
    assert all(0 <= row["label_noise"] <= 1 for row in rows)
    assert read_table(folder).schema == JUDGED
    assert verify(folder).ok


def test_batches_do_not_matter(cleaned):
    hashes = [
        read_manifest(cleaned(*EVERYTHING, name=f"by-{batch}", batch_rows=batch)).content_hash for batch in (1000, 7)
    ]
    assert hashes[0] == hashes[1]


def test_a_threshold_of_a_rule_that_is_off_is_no_reason_to_run(cleaned):
    folder = cleaned()
    before = (folder / "_manifest.json").stat().st_mtime_ns
    cleaned("clean={too_long: {action: off, at_most: 9}}")
    assert (folder / "_manifest.json").stat().st_mtime_ns == before


def test_cleaning_real_dialogues_twice(real_data, make_recipe, tmp_path):
    """Every rule over every answer of a published file: the second time nothing is dropped, and the same is flagged."""
    rules = dict.fromkeys(["identical_after_normalisation", "role_label_in_text", "repetition", "refusal"], "flag")
    rules |= dict.fromkeys(["boilerplate", "personal_data", "too_short", "length_ratio"], "flag")
    source = f"sources=[{{dataset: hh-rlhf, path: {real_data / 'hh_rlhf/helpful-online'}}}]"
    recipe = make_recipe(source, f"clean={json.dumps(rules)}", "normalise={}")
    stages.ingest(recipe.sources[0], recipe, tmp_path / "ingest")
    stages.binarize([tmp_path / "ingest"], recipe, tmp_path / "binarize")
    stages.clean(tmp_path / "binarize", recipe, tmp_path / "clean")
    once = read_table(tmp_path / "clean")
    twice = recipe.clean.apply(once)
    assert twice.kept.equals(once)
    assert len(twice.dropped) == 0
    assert dict(twice.flagged) == read_manifest(tmp_path / "clean").steps[1].flagged
    assert twice.flagged.keys() == rules.keys()
    assert recipe.normalise.apply(once).changed == 0
