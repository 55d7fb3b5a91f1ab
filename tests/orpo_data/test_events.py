"""OpenLineage run events: in each folder, and where the user's configuration sends them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from orpo_data.errors import OrpoError
from orpo_data.events import EVENTS_NAME, Recorder
from orpo_data.manifest import read_manifest
from pipelines import stages

STAGES = ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"]

FACETS = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "properties": {
            "_producer": {"type": "string", "format": "uri"},
            "_schemaURL": {"type": "string", "format": "uri"},
        },
        "required": ["_producer", "_schemaURL"],
    },
}
DATASET = {
    "type": "object",
    "properties": {
        "namespace": {"type": "string", "minLength": 1},
        "name": {"type": "string", "minLength": 1},
        "facets": FACETS,
        "inputFacets": FACETS,
        "outputFacets": FACETS,
    },
    "required": ["namespace", "name"],
}
RUN_EVENT = {
    "type": "object",
    "properties": {
        "eventTime": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$"},
        "producer": {"type": "string", "format": "uri"},
        "schemaURL": {"type": "string", "pattern": r"/2-0-2/OpenLineage\.json#/\$defs/RunEvent$"},
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "run": {
            "type": "object",
            "properties": {
                "runId": {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
                "facets": FACETS,
            },
            "required": ["runId"],
        },
        "job": {
            "type": "object",
            "properties": {"namespace": {"type": "string"}, "name": {"type": "string"}, "facets": FACETS},
            "required": ["namespace", "name"],
        },
        "inputs": {"type": "array", "items": DATASET},
        "outputs": {"type": "array", "items": DATASET},
    },
    "required": ["eventTime", "producer", "schemaURL", "eventType", "run", "job"],
}
"""What the RunEvent of OpenLineage 2-0-2 requires, written out: the official schema is not at hand offline."""


def read_events(file: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in file.read_text().splitlines()]
    for event in events:
        jsonschema.validate(event, RUN_EVENT, jsonschema.Draft202012Validator)
    return events


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_holds_start_and_complete_of_one_run(prepared: Path, stage: str) -> None:
    start, complete = read_events(prepared / stage / "_lineage.ndjson")
    manifest = read_manifest(prepared / stage)
    assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
    assert start["run"]["runId"] == complete["run"]["runId"]
    assert start["eventTime"] <= complete["eventTime"]
    assert start["job"]["name"] == complete["job"]["name"] == f"test.{manifest.stage}"
    assert start["outputs"] == []
    assert len(start["inputs"]) == len(complete["inputs"]) == len(manifest.inputs)
    (output,) = complete["outputs"]
    assert output["name"] == str((prepared / stage).resolve())
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == manifest.rows
    assert output["outputFacets"]["outputStatistics"]["size"] == sum(shard.bytes for shard in manifest.shards)
    assert output["facets"]["version"]["datasetVersion"] == manifest.content_hash
    steps = [step.model_dump(mode="json", exclude_none=True) for step in manifest.steps]  # events leave nulls out
    assert complete["run"]["facets"]["orpo_steps"]["steps"] == steps


def test_each_output_is_the_next_ones_input(prepared: Path) -> None:
    """By name and by version, so that a server draws one graph."""
    completed = {stage: read_events(prepared / stage / "_lineage.ndjson")[1] for stage in STAGES}
    for stage, before in [
        ("binarize", STAGES[:2]),
        ("clean", ["binarize"]),
        ("split", ["clean"]),
        ("tokenize", ["split"]),
    ]:
        outputs = [completed[name]["outputs"][0] for name in before]
        assert [(i["name"], i["facets"]["version"]["datasetVersion"]) for i in completed[stage]["inputs"]] == [
            (o["name"], o["facets"]["version"]["datasetVersion"]) for o in outputs
        ]


def test_the_columns_are_in_the_schema_facet(prepared: Path) -> None:
    (output,) = read_events(prepared / "tokenize" / "_lineage.ndjson")[1]["outputs"]
    fields = {field["name"]: field["type"] for field in output["facets"]["schema"]["fields"]}
    assert fields["chosen_input_ids"].startswith("list<")
    assert fields["prompt_len"] == "int32"


def test_a_configured_transport_gets_the_same_events(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "file")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", str(tmp_path / "log.ndjson"))
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__APPEND", "true")
    stages.clean(prepared / "binarize", make_recipe(), tmp_path / "clean")
    sent, kept = read_events(tmp_path / "log.ndjson"), read_events(tmp_path / "clean" / "_lineage.ndjson")
    assert len(sent) == 2
    assert [(e["eventType"], e["run"]["runId"], e["outputs"]) for e in sent] == [
        (e["eventType"], e["run"]["runId"], e["outputs"]) for e in kept
    ]


def test_a_failure_is_reported_there(
    tmp_path: Path, prepared: Path, make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "file")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", str(tmp_path / "log.ndjson"))
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__APPEND", "true")
    with pytest.raises(OrpoError, match="no rows left"):
        stages.tokenize(prepared / "split", make_recipe("tokenize.max_prompt_length=1"), tmp_path / "out")
    start, fail = read_events(tmp_path / "log.ndjson")
    assert (start["eventType"], fail["eventType"]) == ("START", "FAIL")
    assert start["run"]["runId"] == fail["run"]["runId"]
    assert fail["run"]["facets"]["errorMessage"]["message"].startswith("tokenize: no rows left of 62")
    assert not (tmp_path / "out").exists()


def test_a_run_that_another_process_tells_of_fails_without_an_event(tmp_path: Path) -> None:
    with pytest.raises(OrpoError), Recorder("job", "train", tmp_path, tmp_path / "out"):
        raise OrpoError("this process only computes")
    assert not (tmp_path / EVENTS_NAME).exists()


def test_a_server_that_does_not_answer_costs_a_warning(
    tmp_path: Path,
    prepared: Path,
    make_recipe: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT", '{"type": "http", "url": "http://127.0.0.1:9", "retry": {"total": 0}}')
    stages.clean(prepared / "binarize", make_recipe(), tmp_path / "clean")
    assert caplog.text.count("lineage event not delivered") == 2
    assert len(read_events(tmp_path / "clean" / "_lineage.ndjson")) == 2


def test_a_line_that_a_kill_tore_is_dropped(tmp_path: Path) -> None:
    """A run that goes on writes behind whole lines, or nobody could read the file."""
    for _ in range(2):
        recorder = Recorder("job", "train", tmp_path, tmp_path / "out")
        recorder.start([])
    with (tmp_path / EVENTS_NAME).open("a") as file:
        file.write('{"eventTime": "20')
    Recorder("job", "train", tmp_path, tmp_path / "out").start([])
    lines = (tmp_path / EVENTS_NAME).read_text().splitlines()
    assert [json.loads(line)["eventType"] for line in lines] == ["START"] * 3
