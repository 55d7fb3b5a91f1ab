"""What a comparison comes to: by hand where it is arithmetic, and from real runs of a tiny model."""

import json

import pytest

from pipelines.compare.page import comparison_printed, comparison_tables, write_comparison
from pipelines.compare.plan import Job, model_folder, plan
from pipelines.compare.results import _answers, _win_rates, mean_sd
from pipelines.compare.work import run_job
from pipelines.console import out


def test_mean_and_deviation_by_hand():
    """[1, 3]: mean 2, deviations ±1, n - 1 = 1, so the variance is 2."""
    assert mean_sd([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5), "n": 2}
    assert mean_sd([5.0, None]) == {"mean": 5.0, "sd": None, "n": 1}
    assert mean_sd([None, float("nan")]) is None


def answers(name: str, method: str, seed: int, lambda_: float | None = None) -> Job:
    return Job(name=name, method=method, seed=seed, lambda_=lambda_, answers=True, needs=("x",))


def test_win_rates_meet_seed_by_seed_and_draw_by_draw():
    """ORPO of seed 1 wins 1 and 0.5 in its two draws; seed 2 has no SFT to meet, so it counts for nothing."""
    jobs = [answers("s1", "sft", 1), answers("o1", "orpo", 1, 0.1), answers("o2", "orpo", 2, 0.1)]
    draws = {"s1": ([0, 0], [0, 5]), "o1": ([1, 2], [1, 1]), "o2": ([9, 9], [9, 9])}
    lengths = [[3, 3], [3, 3]]
    answered = {name: {"rewards": both, "characters": lengths} for name, both in draws.items()}
    rates = _win_rates(jobs, answered)
    rate = rates["orpo lambda=0.1"]["sft"]
    assert rate["mean"] == 0.75
    assert rate["sd"] == pytest.approx(0.125**0.5)
    assert rate["equal_length"] == pytest.approx(0.75)  # all are equally long
    assert rate["error"] == pytest.approx(0.25)  # the first prompt is won in 1, the second in 0.5 of the draws


def test_answers_are_told_over_seeds_and_draws():
    """Two seeds of two draws to two prompts. Seed 1 says the same each time: of four words within a prompt two are
    distinct, and across prompts each draw has two of four. Seed 2 never says a word twice."""
    jobs = [answers("s1", "sft", 1), answers("s2", "sft", 2)]
    same, other = [["a b", "a b"]] * 2, [["a b", "c d"], ["e f", "g h"]]
    told = {"characters": [[3, 3], [3, 3]], "ended": [[True, True], [True, False]]}
    answered = {
        "s1": {**told, "rewards": [[0, 2], [4, 6]], "texts": same},
        "s2": {**told, "rewards": [[1, 1], [1, 1]], "texts": other},
    }
    (row,) = _answers(jobs, answered)
    assert row["reward"] == {"mean": 2.0, "sd": pytest.approx(2.0), "n": 4}  # 1, 5, 1, 1
    assert row["rewards"] == [0, 2, 4, 6, 1, 1, 1, 1]
    assert row["unended"]["mean"] == 0.25
    for name in ("within", "across"):
        assert row["distinct_1"][name] == {"mean": 0.75, "sd": pytest.approx(0.125**0.5), "n": 2}


@pytest.fixture(scope="module")
def compared(comparing, prepared, tmp_path_factory):
    """A comparison of two seeds, written; the second ORPO run failed. Read only."""
    import shutil

    root = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(prepared, root)
    recipe = comparing("compare={seeds: [1, 2]}")
    jobs = plan(recipe)
    outcomes = {job.name: run_job(job, recipe, root) for job in jobs[:-1]}
    outcomes[jobs[-1].name] = {"error": "the loss is nan"}
    page, comparison = write_comparison(recipe, root, outcomes)
    return root, jobs, page, comparison


def test_the_table_has_mean_and_deviation_of_the_runs_own_figures(compared):
    root, jobs, _, comparison = compared
    sft, orpo = comparison["held_out"]
    accuracies = [
        json.loads((model_folder(root, job.name) / "train.json").read_text())["metrics"]["eval/rewards/accuracies"]
        for job in jobs
        if job.method == "sft"
    ]
    assert (sft["label"], sft["runs"]) == ("sft", 2)
    assert sft["accuracy"] == mean_sd(accuracies)
    assert (orpo["label"], orpo["runs"], orpo["log odds ratio"]["sd"]) == ("orpo lambda=0.1", 1, None)


def test_a_run_that_failed_is_told_and_the_others_are_there(compared):
    _, jobs, page, comparison = compared
    assert comparison["failed"] == [{"name": jobs[-1].name, "error": "the loss is nan"}]
    assert [run["name"] for run in comparison["runs"]] == [job.name for job in jobs[:-1]]
    with out.capture() as captured:
        out.print(comparison_printed(comparison))
    for text in (page.read_text(), captured.get()):
        assert "the loss is nan" in text
        assert "orpo lambda=0.1" in text


def test_costs_are_counted(compared):
    """Two steps of four pairs: SFT runs their chosen answers, ORPO both sides."""
    _, _, _, comparison = compared
    sft, orpo = comparison["costs"]
    assert (sft["steps"]["mean"], sft["forward_passes"]["mean"], orpo["forward_passes"]["mean"]) == (2, 8, 16)
    assert sft["seconds"]["mean"] > 0


def test_every_model_leads_back_to_the_rows(compared, prepared):
    root, _, _, comparison = compared
    from orpo_data.manifest import read_manifest

    for run in comparison["runs"]:
        made_of = run["lineage"]
        assert made_of["dataset"] == read_manifest(root / "tokenize").fingerprint
        assert made_of["weights"] == read_manifest(root / run["model"]).content_hash
        assert {item["name"] for item in made_of["raw"]} >= {"train.jsonl", "evol_instruct.jsonl"}


def test_the_same_comparison_has_the_same_bytes(compared):
    root, _, _, comparison = compared
    assert json.loads((root / "compare/comparison.json").read_text()) == comparison
    assert {path.name for path in (root / "compare").iterdir() if path.is_file()} == {"comparison.json", "report.html"}
    assert comparison_tables(comparison).startswith("| ")
