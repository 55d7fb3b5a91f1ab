"""Mixing, removing duplicates and decontaminating, as a recipe asks for them."""

import json

import pytest

from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import read_manifest
from orpo_data.shards import read_table
from pipelines import stages
from pipelines.layout import Layout


@pytest.fixture
def run_until_split(tmp_path, make_recipe, own_raw_data):
    """The stages up to the split; their manifests by name."""

    def run(*overrides):
        recipe, place = make_recipe(*overrides, raw=own_raw_data), Layout(tmp_path / "run")
        for source in recipe.sources:
            stages.ingest(source, recipe, place.ingest(source.label))
        stages.binarize([place.ingest(source.label) for source in recipe.sources], recipe, place.binarize)
        reports = [stages.clean(place.binarize, recipe, place.clean), stages.split(place.clean, recipe, place.split)]
        return {name: read_manifest(place.root / name) for name in ("binarize", "clean", "split")} | {"ran": reports}

    return run


def test_the_mix_by_count_and_by_weight(run_until_split):
    manifests = run_until_split("sources.0.count=10", "sources.1.weight=0.5")
    steps = {(step.source, step.step): step for step in manifests["binarize"].steps}
    assert steps["hh-rlhf", "sample"].rows_out == 10
    assert 2 < steps["ultrafeedback", "sample"].rows_out < 18
    (split,) = manifests["split"].steps
    mix = split.facts["sources"]
    assert sum(source["train"] + source["eval"] for source in mix.values()) == split.rows_out
    assert sum(source["share"] for source in mix.values()) == pytest.approx(1, abs=1e-3)


def test_more_than_a_source_has(run_until_split):
    with pytest.raises(OrpoError, match=r"^source 'ultrafeedback': count asks for 100 pairs, there are 20$"):
        run_until_split("sources.1.count=100")


@pytest.fixture
def exam(tmp_path, own_raw_data):
    """An evaluation set with one question of the raw files."""
    row = json.loads((own_raw_data / "uf/evol_instruct.jsonl").read_text().splitlines()[3])
    file = tmp_path / "exam.jsonl"
    file.write_text(json.dumps({"question": row["instruction"].upper()}))
    return file


def test_duplicates_and_contamination_on_record(run_until_split, own_raw_data, exam):
    file = own_raw_data / "uf/evol_instruct.jsonl"
    first = file.read_text().splitlines()[0]
    file.write_text(file.read_text() + first + "\n")
    overrides = [f"decontaminate.against=[{{name: exam, path: {exam}, column: question}}]", "dedup.near=null"]
    clean = run_until_split(*overrides)["clean"]
    steps = {step.step: step for step in clean.steps}
    assert list(steps) == ["clean", "dedup", "decontaminate"]
    assert steps["dedup"].dropped == {"duplicate_pair": 1}
    assert steps["dedup"].facts["cluster_sizes"] == {"2": 1}
    assert steps["decontaminate"].dropped == {"contaminated_exact": 1}
    (known,) = steps["decontaminate"].facts["evaluation_sets"]
    assert (known["name"], known["items"]) == ("exam", 1)
    assert steps["decontaminate"].config["sets"] == [{key: known[key] for key in ("name", "items", "digest")}]


def test_the_questions_are_part_of_the_key_not_their_file(run_until_split, exam):
    def against(file):
        return f"decontaminate.against=[{{name: exam, path: {file}, column: question}}]"

    assert run_until_split(against(exam))["ran"][0].ran
    moved = exam.rename(exam.with_name("moved.jsonl"))
    assert not run_until_split(against(moved))["ran"][0].ran
    moved.write_text(json.dumps({"question": "Another?"}))
    report = run_until_split(against(moved))["ran"][0]
    assert report.ran
    assert "sets[0].digest" in report.why


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources.0={dataset: pairs, path: x, weight: 0.5, count: 3}", "weight (0.5) and count (3) cannot both be set"),
        ("decontaminate={}", "decontaminate: nothing to compare with: name evaluation sets in `against`, or `subsets`"),
        ("decontaminate.against=[ifeval, ifeval]", "decontaminate: against: 'ifeval' stands twice"),
        ("decontaminate.against=[gsm8k]", "decontaminate.against.0: 'gsm8k' is not a built-in evaluation set"),
        ("decontaminate={against: [ifeval], ngrams: 8}", "unknown key 'decontaminate.ngrams'; did you mean 'ngram'?"),
        (
            "decontaminate.against=[{name: ifeval, colum: x}]",
            "unknown key 'decontaminate.against.0.colum'; did you mean",
        ),
        ("dedup.near=0.3", "dedup.near: Input should be greater than 0.4 (it is 0.3)"),
        ("dedup.on=answer", "dedup.on: Input should be 'pair' or 'prompt' (it is 'answer')"),
        (
            "split.eval_fractions={talk: 0.1}",
            "split.eval_fractions: no source 'talk', there are hh-rlhf, ultrafeedback",
        ),
        ("split.eval_fractions={hh-rlhf: 1}", "split.eval_fractions.hh-rlhf: Input should be less than 1 (it is 1)"),
    ],
)
def test_wrong_settings_name_their_key(make_recipe, override, message):
    with pytest.raises(UsageError) as error:
        make_recipe(override)
    assert message in str(error.value)


def test_an_empty_evaluation_set_harms_nothing(run_until_split, exam, tmp_path):
    run_until_split()
    before = read_table(tmp_path / "run/clean")
    exam.write_text("")
    with pytest.raises(OrpoError, match=r"^decontaminate: evaluation set 'exam': .* is empty"):
        run_until_split(f"decontaminate.against=[{{name: exam, path: {exam}, column: question}}]")
    assert read_table(tmp_path / "run/clean").equals(before)
