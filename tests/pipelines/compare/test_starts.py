"""DPO and PPO in a comparison: both start from the SFT model, one holds to it, one learns from the reward model."""

import shutil

from orpo_data.manifest import read_manifest
from pipelines.compare.plan import model_folder, plan
from pipelines.compare.results import collect
from pipelines.compare.work import run_job


def test_dpo_starts_from_sft_and_holds_to_it(comparing, prepared, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(prepared, root)
    recipe = comparing("compare={methods: {sft: {}, dpo: {beta: 0.5}}, seeds: [1]}")
    jobs = plan(recipe)
    outcomes = {job.name: run_job(job, recipe, root) for job in jobs}
    reference = read_manifest(root / "compare/dpo,seed=1/reference")
    trained = read_manifest(model_folder(root, "dpo,seed=1"))
    assert reference.inputs[0].fingerprint == read_manifest(root / "tokenize").fingerprint
    assert trained.inputs[0].fingerprint == reference.fingerprint
    assert trained.inputs[1].fingerprint == reference.inputs[1].fingerprint
    assert trained.recipe["train"]["beta"] == 0.5
    assert not any(run_job(job, recipe, root)["ran"] for job in jobs)
    sft, dpo = collect(jobs, outcomes, recipe, root)["runs"]
    assert dpo["lineage"]["base"] == "sft,seed=1"
    assert sft["forward_passes"] == 2 * 4
    assert dpo["forward_passes"] == 2 * 4 * 2 + 2 * reference.rows  # each pair twice, and all pairs by the reference


def test_ppo_starts_from_sft_and_learns_from_the_reward_model(comparing, prepared, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(prepared, root)
    settings = "{max_steps: 1, ppo: {max_new_tokens: 4, epochs: 1, minibatches: 1}}"
    recipe = comparing(
        f"compare={{methods: {{reward: {{seed: 3}}, sft: {{}}, ppo: {settings}}}, seeds: [1], prompts: 2}}"
    )
    jobs = plan(recipe)
    outcomes = {job.name: run_job(job, recipe, root) for job in jobs}
    trained = read_manifest(model_folder(root, "ppo,seed=1"))
    assert trained.recipe["train"]["ppo"]["kl"] == 0.1
    assert trained.recipe["train"]["ppo"]["max_new_tokens"] == 4
    assert trained.recipe["train"]["seed"] == 1
    assert read_manifest(model_folder(root, "reward")).recipe["train"]["seed"] == 3
    comparison = collect(jobs, outcomes, recipe, root)
    ppo = comparison["runs"][-1]
    assert (ppo["label"], ppo["steps"], ppo["lineage"]["base"]) == ("ppo", 1, "sft,seed=1")
    assert ppo["forward_passes"] > 4
    assert [row["label"] for row in comparison["answers"]] == ["sft", "ppo"]
    assert not any(run_job(job, recipe, root)["ran"] for job in jobs)
