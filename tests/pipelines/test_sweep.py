"""Sweeps: each combination is trained once, all are compared."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orpo_data.errors import OrpoError
from pipelines import sweep
from pipelines.jobs import sweep_jobs
from pipelines.sweep import comparison_table, train_sweep
from pipelines.training import train_model

QUICK = [
    f"train.{setting}"
    for setting in ("max_steps=3", "batch_size=4", "precision=fp32", "learning_rate=0.01", "eval_every=1", "lambda=1")
]
COMPARISON = {"comparison.json", "comparison.md", "comparison.png"}


@pytest.fixture(scope="module")
def jobs_of(prepared, tiny_model_dir):
    def jobs(output, *sweeps):
        return sweep_jobs(sweeps, None, prepared / "tokenize", str(tiny_model_dir), output, QUICK)

    return jobs


@pytest.fixture(scope="module")
def swept(jobs_of, tmp_path_factory):
    """A finished sweep. Read only."""
    return train_sweep(jobs_of(tmp_path_factory.mktemp("swept"), "objective=sft,orpo"))


def test_a_model_that_is_not_there_is_told_before_anything_is_trained(jobs_of, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OrpoError, match=r"train\.model: 'nobody/none' is no local folder"):
        train_sweep(jobs_of(tmp_path, f"model={tiny_model_dir},nobody/none"))
    assert list(tmp_path.iterdir()) == []


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_folder_holds_a_model_for_each_run_and_the_comparison(swept):
    assert swept.path.name == "sweep"
    assert {path.name for path in swept.path.iterdir()} == COMPARISON | {"objective=sft", "objective=orpo"}
    for report in swept.runs.values():
        assert report.ran
        assert [path.name for path in report.path.parent.iterdir()] == ["model"]


def test_the_comparison_has_the_held_out_figures(swept):
    document = json.loads((swept.path / "comparison.json").read_text())
    assert document == swept.comparison
    assert document["figures"] == "held-out pairs"
    for run, (name, report) in zip(document["runs"], swept.runs.items(), strict=True):
        assert run["name"] == name
        assert swept.path / run["model"] == report.path
        assert run["metrics"] == report.metrics
        for figure in ("loss", "nll_loss", "log_odds_chosen", "rewards/accuracies", "logps/chosen", "logps/rejected"):
            assert run[figure] == report.metrics[f"eval/{figure}"]
    sft, orpo = document["runs"]
    assert sft["loss"] == pytest.approx(sft["nll_loss"])
    assert orpo["loss"] > orpo["nll_loss"]


def test_the_page_and_the_table_say_the_same(swept):
    page = (swept.path / "comparison.md").read_text()
    assert "(comparison.png)" in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| objective=")]
    table = comparison_table(swept.comparison)
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert [[cell.strip("| ") for cell in row] for row in rows] == [list(row) for row in zip(*columns, strict=True)]
    assert f"{swept.runs['objective=orpo'].metrics['eval/loss']:.4f}" in rows[1]


def test_the_picture_gets_every_runs_metrics(swept, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(sweep, "draw_comparison", lambda path, runs: drawn.update(runs) or path.touch())
    sweep.write_comparison(tmp_path, swept.comparison, {"a": [{"step": 1}]})
    assert drawn == {"a": [{"step": 1}]}
    for name, report in swept.runs.items():
        lines = sweep.read_metrics(report.path)
        assert [line["step"] for line in lines if "eval/logps/rejected" in line] == [0, 1, 2, 3], name


def test_an_interrupted_sweep_goes_on(swept, jobs_of, tmp_path, monkeypatch):
    own = Path(shutil.copytree(swept.path, tmp_path / "sweep"))
    for name in COMPARISON:
        (own / name).unlink()
    trained = []

    def counting(*given, **settings):
        report = train_model(*given, **settings)
        trained.append(report.ran)
        return report

    monkeypatch.setattr(sweep, "train_model", counting)
    more = train_sweep(jobs_of(tmp_path, "objective=sft,orpo,probability-ratio"))
    assert trained == [False, False, True]
    assert [run["name"] for run in more.comparison["runs"]][2] == "objective=probability-ratio"
    assert more.comparison["runs"][:2] == swept.comparison["runs"]
    assert {path.name for path in own.iterdir() if path.is_file()} == COMPARISON


def test_without_held_out_pairs_the_last_batch_is_compared(swept):
    bare = {
        name: replace(report, metrics={"loss": 2.0, "nll_loss": 1.0, "logps/chosen": -1.0})
        for name, report in swept.runs.items()
    }
    comparison = sweep.compare_runs(bare)
    assert comparison["figures"] == "last training batch"
    assert comparison["runs"][0]["logps/rejected"] is None
    assert [str(cell) for cell in comparison_table(comparison).columns[-1].cells] == ["", ""]


def test_a_failing_run_is_named(jobs_of, tmp_path, monkeypatch):
    def fail(*given, **settings):
        raise OrpoError("the loss is nan")

    monkeypatch.setattr(sweep, "train_model", fail)
    with pytest.raises(OrpoError, match=r"^lambda=2\.0: the loss is nan$"):
        train_sweep(jobs_of(tmp_path, "lambda=2"))


def test_train_command_prints_the_comparison(orpo, prepared, tiny_model_dir, tmp_path):
    settings = [word for override in QUICK for word in ("--set", override)]
    command = ["train", "--dataset", prepared / "tokenize", "--model", tiny_model_dir, "-o", tmp_path, *settings]
    told = orpo(*command, "--sweep", "lambda=0.1,1", "--json")
    assert told.code == 0, told.err
    document = json.loads(told.out)
    assert document["path"] == str(tmp_path / "sweep")
    shown = orpo(*command, "--sweep", "lambda=0.1,1")
    assert "log odds ratio" in shown.out
    assert str(tmp_path / "sweep" / "comparison.png") in shown.out
    for run in document["runs"]:
        (line,) = (line for line in shown.out.splitlines() if line.split()[:1] == [run["name"]])
        assert f"{run['loss']:.4f}" in line.split()
