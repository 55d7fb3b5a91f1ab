"""A stage whose rows drifted too far from its previous output leaves that in its place."""

import json
import pickle

import pytest

import orpo_data
from orpo_data.errors import UsageError
from orpo_data.manifest import read_manifest
from pipelines import prepare, stages
from pipelines.drift import DriftConfig, DriftError, exceeded

NO_LIMITS = dict.fromkeys(DriftConfig.model_fields)


def diff_of(**found):
    """A comparison of 100 rows with 100, as plain values, in which nothing happened but `found`."""
    version = {"rows": 100, "rows_read": 200}
    return {"old": version, "new": version, "rows_out": 0, "rows_changed": 0, "dropped": [], "shifts": []} | found


@pytest.mark.parametrize(
    ("name", "found", "says"),
    [
        ("max_rows_lost", {"rows_out": 11}, "11.0% of the rows are gone"),
        ("max_rows_changed", {"rows_changed": 11}, "11.0% of the rows changed"),
        (
            "max_drop_rate_rise",
            {"dropped": [{"step": "parse", "reason": "unparsable", "old": 2, "new": 24}]},
            "11.0% more of the rows read are dropped as unparsable",
        ),
        (
            "max_distribution_shift",
            {"shifts": [{"column": "margin", "distance": 0.11}, {"column": "source", "distance": 0.1}]},
            "11.0% of the distribution of margin moved",
        ),
    ],
)
def test_a_threshold_names_itself_and_by_how_much(name, found, says):
    def told(limit):
        return list(exceeded(diff_of(**found), DriftConfig(**NO_LIMITS | {name: limit})))

    assert told(0.1) == [f"{says} (drift.{name} is 10.0%)"]
    assert told(0.12) == told(None) == []


def test_what_falls_and_what_shrinks_is_no_drift():
    calm = diff_of(rows_in=1000, dropped=[{"step": "parse", "reason": "unparsable", "old": 24, "new": 2}])
    assert list(exceeded(calm, DriftConfig(**dict.fromkeys(DriftConfig.model_fields, 0)))) == []


@pytest.fixture
def cleaned(prepared, tmp_path, make_recipe):
    """Clean into one folder, with a `drift` section."""

    def run(*overrides):
        return stages.clean(prepared / "binarize", make_recipe("drift={}", *overrides), tmp_path / "clean")

    return run


def test_the_older_folder_stays_when_the_new_rows_are_refused(cleaned, tmp_path, snapshot):
    cleaned("clean.length_ratio.action=off")
    before = snapshot(tmp_path)
    with pytest.raises(DriftError, match=r"^clean: too far from the previous rows in .*clean, which stay: ") as refused:
        cleaned("clean.length_ratio={action: drop, at_most: 1.8}")
    assert snapshot(tmp_path) == before
    assert "run once with --set drift=null" in str(refused.value)
    assert refused.value.diff["why_out"][0]["reason"] == "length_ratio"
    assert orpo_data.verify(tmp_path / "clean").ok


def test_a_refused_run_is_never_reported_complete(cleaned, monkeypatch):
    completed = []
    monkeypatch.setattr("orpo_data.events.Recorder.complete", lambda *arguments: completed.append(arguments))
    cleaned()
    with pytest.raises(DriftError):
        cleaned("clean.length_ratio={action: drop, at_most: 1.8}")
    assert len(completed) == 1


def test_a_report_carries_the_difference(cleaned):
    assert cleaned().diff == {}, "there was nothing before"
    assert cleaned().diff == {}, "unchanged"
    changed = cleaned("clean.length_ratio.action=flag", "drift.max_distribution_shift=null")
    assert changed.ran
    assert changed.diff["rows_in"] == changed.diff["rows_out"] == 0


def test_a_damaged_folder_is_made_anew_without_a_comparison(cleaned, tmp_path, caplog):
    first = cleaned()
    next((tmp_path / "clean").glob("*.arrow")).unlink()
    again = cleaned()
    assert (again.ran, again.diff, again.content_hash) == (True, {}, first.content_hash)
    assert "cannot be compared with the new rows" in caplog.text


def test_without_the_section_anything_goes(prepared, tmp_path, make_recipe):
    for overrides in ((), ("clean.ties=keep",)):
        assert stages.clean(prepared / "binarize", make_recipe(*overrides), tmp_path / "clean").diff == {}


def test_stages_that_passed_are_newer_and_lineage_says_so(own_raw_data, tmp_path, make_recipe):
    place = tmp_path / "run"
    prepare(make_recipe("drift={}", raw=own_raw_data), place)
    before = read_manifest(place / "tokenize")
    with (own_raw_data / "hh/train.jsonl").open("a") as file:
        pair = {"chosen": "\n\nHuman: New?\n\nAssistant: Yes.", "rejected": "\n\nHuman: New?\n\nAssistant: No."}
        file.write(json.dumps(pair) + "\n")
    with pytest.raises(DriftError, match=r"^tokenize: .* more of the rows read are dropped as prompt_too_long"):
        prepare(make_recipe("drift={}", "tokenize.max_prompt_length=40", raw=own_raw_data), place)
    assert read_manifest(place / "tokenize") == before
    assert [node.path.name for node in orpo_data.lineage(place / "tokenize").nodes if not node.sound] == ["split"]


def test_the_section_is_checked(make_recipe):
    with pytest.raises(UsageError, match="max_rows_gone"):
        make_recipe("drift={max_rows_gone: 0.1}")
    with pytest.raises(UsageError, match="less than or equal to 1"):
        make_recipe("drift={max_rows_lost: 5}")


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(DriftError("too far", {"rows_out": 3})))
    assert (str(error), error.diff) == ("too far", {"rows_out": 3})
