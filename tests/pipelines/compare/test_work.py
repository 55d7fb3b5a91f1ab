"""A policy's answers under a judge: drawn once, kept while nothing changed."""

import json

import pytest

from orpo_data.errors import OrpoError
from pipelines.compare.plan import plan
from pipelines.compare.work import run_job

METHODS = (
    "compare={methods: {judge: {}, sft: {}}, seeds: [1], prompts: 3, draws: 2, sampling: {max_new_tokens: 4, seed: 5}}"
)


@pytest.fixture(scope="module")
def answered(comparing, prepared, tmp_path_factory):
    """A judge and an SFT model, and its answers. Read only."""
    import shutil

    root = tmp_path_factory.mktemp("answered") / "run"
    shutil.copytree(prepared, root)
    recipe = comparing(METHODS)
    return root, recipe, {job.name: run_job(job, recipe, root) for job in plan(recipe)}


def test_every_prompt_is_answered_in_every_draw(answered):
    root, _, outcomes = answered
    told = json.loads((root / "compare/sft,seed=1/answers/answers.json").read_text())
    assert outcomes["sft,seed=1,answers"] == {
        "path": str(root / "compare/sft,seed=1/answers/answers.json"),
        "ran": True,
    }
    assert told["seeds"] == [5, 6]
    assert len(told["ids"]) == 3
    for column in ("rewards", "characters", "ended", "texts"):
        assert [len(draw) for draw in told[column]] == [3, 3], column


def test_answers_are_the_models_own_and_their_rewards_the_judges(answered):
    """Against generation and scoring one by one."""
    from orpo_data.shards import read_table
    from orpo_train.batching import PairDataset
    from orpo_train.config import Sampling
    from orpo_train.evaluate import load_tokenizer
    from orpo_train.generate import end_tokens, generate
    from orpo_train.model import load_model
    from orpo_train.reward import load_reward_model, score

    root, _, _ = answered
    told = json.loads((root / "compare/sft,seed=1/answers/answers.json").read_text())
    table = read_table(root / "tokenize", "eval")
    data, rows = PairDataset(table), table["id"].to_pylist()
    folder = root / "compare/sft,seed=1/model"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    judge = load_reward_model(root / "compare/judge/model")
    for number, rewards in enumerate(told["rewards"]):
        for name, reward in zip(told["ids"], rewards, strict=True):
            prompt = data.prompt(rows.index(name)).tolist()
            sampling = Sampling(max_new_tokens=4, seed=5 + number)
            (answer,) = generate(model, [prompt], sampling, end_tokens(model, tokenizer))
            assert score(judge, [prompt + answer]).tolist() == pytest.approx([reward], abs=1e-4)


def test_answers_are_kept_until_something_changes(answered, comparing):
    root, recipe, _ = answered
    job = plan(recipe)[-1]
    assert not run_job(job, recipe, root)["ran"]
    file = root / "compare/sft,seed=1/answers/answers.json"
    before = file.read_bytes()
    warmer = comparing(METHODS.replace("seed: 5", "seed: 6"))
    assert run_job(job, warmer, root)["ran"]
    assert file.read_bytes() != before
    assert run_job(job, recipe, root)["ran"]
    assert file.read_bytes() == before


def test_without_held_out_prompts_there_is_nothing_to_answer(answered, comparing, own_run, monkeypatch):
    import shutil

    root, _, _ = answered
    shutil.copytree(root / "compare", own_run / "compare")
    recipe = comparing(METHODS)
    monkeypatch.setattr("pipelines.compare.work.read_table", lambda folder, split: [])
    (own_run / "compare/sft,seed=1/answers/answers.json").unlink()
    with pytest.raises(OrpoError, match=r"has no held-out prompts to answer; raise split\.eval_fraction"):
        run_job(plan(recipe)[-1], recipe, own_run)
