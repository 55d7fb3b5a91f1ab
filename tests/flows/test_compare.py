"""The comparison as a flow: what it hands on, what goes on when a job fails. Jobs are tested elsewhere."""

import json
from types import SimpleNamespace

import pytest

from orpo_data.errors import OrpoError, UsageError

pytestmark = pytest.mark.usefixtures("prefect_server")

COMPARE = ("train={model: base}", "compare={methods: {reward: {}, sft: {}, orpo: {}}, seeds: [1, 2]}")


@pytest.fixture
def compare(recipe_file, tmp_path, monkeypatch):
    """Runs the flow with jobs that only fail when asked to: (result or error, outcomes, jobs in their order)."""
    from flows import compare as module
    from pipelines.compare import page

    def run(*failing, error=OrpoError):
        ran, outcomes = [], {}

        def job_apart(job, recipe, root):
            ran.append(job.name)
            if job.name in failing:
                raise error(f"{job.name} went wrong")
            return {"path": str(root / job.name), "ran": True, "cost": None}

        def write(recipe, root, found):
            outcomes.update(found)
            failed = [{"name": name, "error": told["error"]} for name, told in found.items() if "error" in told]
            tables = {"win_rates": {}, "reward_models": [], "held_out": [], "pairs": {"eval": 3}}
            comparison = {"failed": failed, **tables}
            return root / "report.html", comparison

        monkeypatch.setattr(module, "run_apart", job_apart)
        monkeypatch.setattr(page, "write_comparison", write)
        recipe = recipe_file(*COMPARE, "name=cmp")
        try:
            result = module.compare_flow(recipe, output=str(tmp_path))
        except module.ComparisonError as failure:
            result = failure
        return result, outcomes, ran

    return run


def test_every_job_runs_once_after_what_it_needs(compare, tmp_path):
    result, outcomes, ran = compare()
    assert [report["stage"] for report in result["stages"]][-1] == "tokenize"
    assert result["page"] == str(tmp_path / "report.html")
    assert sorted(ran) == sorted(outcomes)
    assert len(ran) == 1 + 2 * 2 * 2
    for name in ran:
        if name.endswith(",answers"):
            assert {name.removesuffix(",answers"), "reward"} <= {*ran[: ran.index(name)]}


def test_what_a_failed_job_does_not_touch_goes_on(compare):
    failure, outcomes, ran = compare("sft,seed=1")
    assert outcomes["sft,seed=1"] == {"error": "sft,seed=1 went wrong"}
    assert outcomes["sft,seed=1,answers"] == {"error": "not run: it needs sft,seed=1"}
    assert sum("error" in outcome for outcome in outcomes.values()) == 2
    assert len(ran) == len(outcomes) - 1
    assert str(failure) == "2 runs failed, the first is sft,seed=1: sft,seed=1 went wrong"
    assert failure.result["comparison"]["failed"][0]["name"] == "sft,seed=1"


def test_without_a_judge_models_are_trained_all_the_same(compare):
    _, outcomes, _ = compare("reward")
    assert {name for name, outcome in outcomes.items() if "error" not in outcome} == {
        f"{method},seed={seed}" for method in ("sft", "orpo,lambda=0.1") for seed in (1, 2)
    }


def test_a_bug_is_no_failed_run(compare):
    with pytest.raises(ZeroDivisionError):
        compare("reward", error=ZeroDivisionError)


def test_prefect_is_told_no_secret(recipe_file, tmp_path, monkeypatch):
    """It keeps what a flow was called with."""
    from flows import compare as module
    from pipelines.compare import page

    told, comparison = [], {"failed": [], "win_rates": {}, "reward_models": [], "held_out": [], "pairs": {"eval": 3}}
    jobs = SimpleNamespace(with_options=lambda **options: lambda *arguments: told.append(arguments) or {})
    monkeypatch.setattr(module, "jobs_flow", jobs)
    monkeypatch.setattr(module, "prepare_data", lambda settings, place: [])
    monkeypatch.setattr(page, "write_comparison", lambda recipe, root, found: (root / "report.html", comparison))
    source = "{dataset: hh-rlhf, path: 'https://planted:planted@127.0.0.1/rows.jsonl?signature=planted'}"
    module.compare_flow(recipe_file(*COMPARE, "name=cmp", f"sources=[{source}]"), output=str(tmp_path))
    [(recipe, _)] = told
    assert recipe["sources"][0]["path"] == "https://127.0.0.1/rows.jsonl"
    assert "planted" not in json.dumps(told)


def test_a_wrong_section_is_told_before_anything_runs(recipe_file, tmp_path):
    from flows.compare import compare_flow

    with pytest.raises(UsageError, match="has no `compare` section"):
        compare_flow(recipe_file("train={model: base}"), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_storage_is_told_before_anything_runs(recipe_file, memory):
    """Its jobs train into local folders."""
    from flows.compare import compare_flow

    with pytest.raises(UsageError, match="compare: trains into folders of this machine; give -o a local one"):
        compare_flow(recipe_file(*COMPARE), output=str(memory))
    assert not memory.exists()
