"""DPO in a comparison: its reference is the SFT model it starts from."""

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
