import json

import pytest
import yaml

from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import read_manifest
from pipelines.drift import DriftError
from pipelines.layout import Layout
from pipelines.recipe import Recipe

pytestmark = pytest.mark.usefixtures("prefect_server")


def artifacts():
    """Key -> newest artifact."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    return {artifact.key: artifact for artifact in sorted(found, key=lambda artifact: artifact.created)}


def dataset_folders(recipe, root):
    place = Layout(root)
    ingested = [place.ingest(source.label) for source in recipe.sources]
    return [*ingested, place.binarize, place.clean, place.split, place.tokenize]


@pytest.fixture(scope="module")
def prepared_by_flow(recipe_file, tmp_path_factory, prefect_server):
    """What prepare_flow returns, and its output folder."""
    from flows.pipeline import prepare_flow

    output = tmp_path_factory.mktemp("flow")
    return prepare_flow(recipe_file("name=Flow & Test"), output=str(output)), output


def test_the_flow_writes_the_bytes_of_the_bare_stages(prepared_by_flow, prepared, make_recipe):
    result, output = prepared_by_flow
    here, there = (dataset_folders(make_recipe(), root) for root in (output, prepared))
    assert [report["path"] for report in result["stages"]] == [str(folder) for folder in here]
    expected = [read_manifest(folder).content_hash for folder in there]
    assert [report["content_hash"] for report in result["stages"]] == expected
    assert [read_manifest(folder).content_hash for folder in here] == expected


def test_results_are_paths_digests_and_counts(prepared_by_flow):
    result, _ = prepared_by_flow
    names = [
        "content_hash",
        "diff",
        "dropped",
        "fingerprint",
        "path",
        "ran",
        "rows_in",
        "rows_out",
        "seconds",
        "stage",
        "why",
    ]
    for report in result["stages"]:
        assert sorted(report) == names
        assert all(isinstance(report[name], str | int | float | dict) for name in names)
        assert all(isinstance(count, int) for count in report["dropped"].values())


def test_the_artifact_has_the_counts_of_every_stage(prepared_by_flow):
    result, _ = prepared_by_flow
    page = artifacts()["flow-test-stages"].data
    assert page.startswith("# Flow &amp; Test\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(result["stages"]) == 6
    for row, report in zip(rows, result["stages"], strict=True):
        assert row[:3] == [report["stage"], f"{report['rows_in']:,}", f"{report['rows_out']:,}"]
        assert row[5] == report["content_hash"][:12]
        assert all(f"{count:,} {reason}" in row[3].replace("\\", "") for reason, count in report["dropped"].items())
    assert any(report["dropped"] for report in result["stages"])


def test_a_second_run_runs_nothing_and_a_deleted_output_runs_again(recipe_file, tmp_path):
    import shutil

    from flows.pipeline import prepare_flow

    recipe = recipe_file()
    first = prepare_flow(recipe, output=str(tmp_path))["stages"]
    shutil.rmtree(tmp_path / "clean")
    second = prepare_flow(recipe, output=str(tmp_path))["stages"]
    assert [report["ran"] for report in first] == [True] * 6
    assert [report["stage"] for report in second if report["ran"]] == ["clean"]
    assert [report["content_hash"] for report in second] == [report["content_hash"] for report in first]


def test_a_recipe_is_read_when_the_flow_runs(recipe_file, tmp_path):
    from pathlib import Path

    from flows.pipeline import prepare_flow

    recipe = Path(recipe_file())
    assert prepare_flow(str(recipe), output=str(tmp_path))["stages"][-1]["ran"]
    document = yaml.safe_load(recipe.read_text())
    document["clean"]["ties"] = "keep" if document["clean"]["ties"] == "drop" else "drop"
    recipe.write_text(yaml.safe_dump(document))
    changed = prepare_flow(str(recipe), output=str(tmp_path))["stages"]
    assert "ties" in next(report["why"] for report in changed if report["stage"] == "clean")


def test_a_user_error_comes_out_as_it_is_and_is_not_tried_again(recipe_file, tmp_path, monkeypatch):
    from flows import pipeline

    calls = []
    real = pipeline.stages.ingest
    monkeypatch.setattr(pipeline.stages, "ingest", lambda *args, **more: calls.append(args) or real(*args, **more))
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(OrpoError, match="no such file or folder"):
        pipeline.prepare_flow(recipe_file(), [f"sources.1.path={missing}"], str(tmp_path / "out"))
    assert len(calls) == 2, "one attempt for each source"


def test_a_fault_of_the_network_is_tried_again(recipe_file, tmp_path, monkeypatch):
    from flows import pipeline

    attempts = []
    real = pipeline.stages.ingest

    def ingest_at_the_second_try(source, *args, **more):
        attempts.append(source.label)
        if attempts.count(source.label) == 1 and source.label == "ultrafeedback":
            raise OrpoError("no connection") from ConnectionResetError("reset by peer")
        return real(source, *args, **more)

    monkeypatch.setattr(pipeline.stages, "ingest", ingest_at_the_second_try)
    monkeypatch.setattr(pipeline.ingest, "retry_delay_seconds", [0.01])
    result = pipeline.prepare_flow(recipe_file(), output=str(tmp_path))
    assert len(result["stages"]) == 6
    assert sorted(attempts) == ["hh-rlhf", "ultrafeedback", "ultrafeedback"]


def test_the_whole_run_without_a_train_section_ends_with_the_token_ids(recipe_file, tmp_path):
    from flows.pipeline import run_flow

    result = run_flow(recipe_file(), output=str(tmp_path))
    assert list(result) == ["stages"]
    assert not (tmp_path / "model").exists()


def test_training_without_a_train_section_is_told(recipe_file, tmp_path):
    from flows.pipeline import train_flow

    with pytest.raises(UsageError, match="no `train` section"):
        train_flow(recipe_file(), output=str(tmp_path))


def test_an_objective_that_needs_a_reference_gets_one(prepared_by_flow, recipe_file, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from flows.pipeline import train_flow

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes)).save_pretrained(tmp_path / "tiny")
    _, output = prepared_by_flow
    train = f"{{model: {tmp_path / 'tiny'}, objective: dpo, max_steps: 1, batch_size: 2, precision: fp32}}"
    train_flow(recipe_file(f"train={train}", "evaluate={samples: 0}"), output=str(output))
    assert read_manifest(output / "reference").stage == "reference"
    assert read_manifest(output / "model").inputs[0].name == "reference"


def test_a_model_is_not_evaluated_where_nothing_is_held_out(recipe_file, tmp_path, tiny_model_dir, monkeypatch):
    from flows.pipeline import log, run_flow

    warned: list[str] = []
    monkeypatch.setattr(log, "warning", warned.append)
    training = f"train={{model: {tiny_model_dir}, max_steps: 1, precision: fp32}}"
    result = run_flow(recipe_file(training, "split={eval_fraction: 0}"), output=str(tmp_path))
    assert result.keys() == {"stages", "model"}
    assert (Layout(tmp_path).model / "model.safetensors").exists()
    (told,) = warned
    assert told.startswith("nothing is held out")


def test_the_flow_trains_and_evaluates_in_the_runs_folders(recipe_file, tmp_path, monkeypatch):
    """The stages themselves are tested elsewhere; here, what goes in, what is shown, what is handed on."""
    from dataclasses import make_dataclass

    from flows.pipeline import run_flow
    from pipelines import evaluation, training

    calls = []
    fields = {"fingerprint": "f" * 64, "content_hash": "c" * 64, "ran": True, "why": "no output yet", "seconds": 1.0}

    def train_model(dataset, config, output, *, job, show_progress):
        calls.append((dataset, config.model, output, job))
        output.mkdir()
        (output / "curves.png").write_bytes(b"\x89PNG tiny")
        return make_dataclass("Report", ["path", "metrics", *fields])(output, {"loss": 2.0}, **fields)

    def evaluate_model(model_dir, dataset, output, settings, *, job):
        calls.append((model_dir, dataset, output, settings.max_pairs, job))
        result = {"pairs": 7, "before": {"nll": 2.5}, "after": {"nll": 2.25}, "samples": [{"prompt": "secret"}]}
        return make_dataclass("Report", ["path", "result", *fields])(output, result, **fields)

    monkeypatch.setattr(training, "train_model", train_model)
    monkeypatch.setattr(evaluation, "evaluate_model", evaluate_model)
    result = run_flow(recipe_file("train={model: base}", "evaluate.max_pairs=7", "name=both"), output=str(tmp_path))

    place = Layout(tmp_path)
    assert calls[0] == (place.tokenize, "base", place.model, "both")
    assert calls[1] == (place.model, place.tokenize, place.evaluate, 7, "both")
    assert result["model"]["path"] == str(place.model)
    assert result["evaluation"]["result"] == {"pairs": 7, "before": {"nll": 2.5}, "after": {"nll": 2.25}}
    shown = artifacts()
    assert "| nll | 2.5000 | 2.2500 |" in shown["both-evaluation"].data
    assert "(data:image/png;base64,iVBORyB0aW55)" in shown["both-curves"].data
    assert not any("secret" in str(artifact.data) for artifact in shown.values())


# --- drift -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nightly(recipe_file, own_raw_data, tmp_path):
    """A night's run over raw files of its own, with a `drift` section."""
    from flows.pipeline import run_flow

    sources = f"sources=[{{dataset: hh-rlhf, path: '{own_raw_data / 'hh'}'}}]"

    def run(*overrides):
        return run_flow(recipe_file(sources, "drift={}", *overrides), output=str(tmp_path / "run"))

    return run


def test_a_night_of_little_news_passes_and_shows_its_difference(nightly, own_raw_data):
    first = nightly("name=calm")
    assert not any(report["diff"] for report in first["stages"])
    assert "calm-drift" not in artifacts()
    with (own_raw_data / "hh/train.jsonl").open("a") as file:
        pair = {"chosen": "\n\nHuman: New?\n\nAssistant: Yes, new.", "rejected": "\n\nHuman: New?\n\nAssistant: No."}
        file.write(json.dumps(pair) + "\n")
    second = nightly("name=calm")
    assert [report["diff"]["rows_in"] for report in second["stages"]] == [1] * 5
    assert "| in | 1 | not there |" in artifacts()["calm-drift"].data


def test_a_night_that_loses_rows_fails_and_leaves_everything_as_it_was(nightly, own_raw_data, tmp_path):
    nightly("name=storm")
    (tmp_path / "run/model").mkdir()
    (tmp_path / "run/model/model.safetensors").write_bytes(b"trained last night")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    file = own_raw_data / "hh/train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[10:]))
    for _ in range(2):  # the night after, too
        with pytest.raises(
            DriftError, match=r"^ingest: too far .*: 21\.3% of the rows are gone \(drift\.max_rows_lost is 5\.0%\)"
        ):
            nightly("name=storm", "train={model: base}")
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    page = artifacts()["storm-drift"].data
    assert "| out | 10 | not there |" in page
    assert "(drift.max\\_rows\\_lost is 5.0%)" in page
    assert "## ingest" in page


def test_the_new_rows_are_accepted_when_asked(nightly, own_raw_data):
    nightly("name=accept")
    file = own_raw_data / "hh/train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[10:]))
    result = nightly("name=accept", "drift=null")
    assert [report["ran"] for report in result["stages"]] == [True] * 5
    again = nightly("name=accept")
    assert not any(report["ran"] for report in again["stages"])


def test_a_resolved_recipe_is_read_back_as_it_was(make_recipe):
    """Tasks get the recipe as plain values."""
    recipe = make_recipe("train={model: base, lambda: 0.25}")
    assert Recipe.parse(recipe.resolved()) == recipe
