"""The jobs of a comparison: each once, each after what it needs, each with its own settings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.errors import UsageError
from pipelines.compare.plan import job_config, model_folder, plan
from pipelines.documents import ready_recipes
from pipelines.recipe import Recipe

DOCUMENT = {
    "name": "plan",
    "sources": [{"dataset": "hh-rlhf", "path": "raw"}],
    "tokenize": {"tokenizer": "some/tokenizer"},
    "train": {"model": "some/model", "lambda": 0.5},
}
OPTIONAL = ("reward", "judge", "dpo", "ppo", "orpo")


def recipe_of(**compare: object) -> Recipe:
    return Recipe.parse(DOCUMENT | {"compare": compare}, "my.yaml")


@given(
    methods=st.sets(st.sampled_from(OPTIONAL))
    .filter(lambda s: "ppo" not in s or s & {"reward", "judge"})
    .map(lambda names: {name: {} for name in ("sft", *sorted(names))}),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
)
def test_every_job_stands_once_and_behind_what_it_needs(methods, seeds):
    jobs = plan(recipe_of(methods=methods, seeds=seeds))
    names = [job.name for job in jobs]
    assert len({*names}) == len(names)
    for number, job in enumerate(jobs):
        assert {*job.needs} <= {*names[:number]}
    policies = [job for job in jobs if job.method not in ("reward", "judge") and not job.answers]
    assert len(policies) == len(seeds) * len(methods.keys() - {"reward", "judge"})
    assert len([job for job in jobs if job.answers]) == (len(policies) if {"reward", "judge"} & methods.keys() else 0)


def test_the_plan_of_a_whole_comparison():
    methods = {name: {} for name in ("reward", "judge", "sft", "dpo", "ppo", "orpo")}
    jobs = plan(recipe_of(methods=methods, seeds=[1], lambdas=[0.5, 1.0]))
    policies = {"sft,seed=1": (), "dpo,seed=1": ("sft,seed=1",)}
    policies |= {"ppo,seed=1": ("sft,seed=1", "reward")} | {f"orpo,lambda={x},seed=1": () for x in (0.5, 1)}
    expected = {"reward": (), "judge": ()}
    for name, needs in policies.items():
        expected |= {name: needs, f"{name},answers": (name, "judge")}
    assert {job.name: job.needs for job in jobs} == expected
    assert [job.label for job in jobs if not job.answers] == [
        "reward",
        "judge",
        "sft",
        "dpo",
        "ppo",
        "orpo lambda=0.5",
        "orpo lambda=1",
    ]


def test_two_lambdas_have_two_names_however_near_they_are():
    jobs = plan(recipe_of(methods={"orpo": {}}, seeds=[1], lambdas=[0.12345678, 0.12345679]))
    orpo = [job for job in jobs if job.method == "orpo"]
    assert len({job.name for job in orpo}) == len({job.label for job in orpo}) == len(orpo) == 3  # the recipe's own too


def test_a_method_has_the_recipes_settings_and_its_own(tmp_path):
    recipe = recipe_of(
        methods={"sft": {"learning_rate": 0.25, "seed": 9}, "orpo": {"epochs": 3}}, seeds=[7], lambdas=[2]
    )
    sft, first, second = (job_config(job, recipe, tmp_path) for job in plan(recipe))
    assert (sft.objective, sft.learning_rate, sft.epochs, sft.seed) == ("sft", 0.25, 1, 7)
    assert (first.objective, first.lambda_, first.learning_rate, first.epochs) == ("orpo", 0.5, 8e-6, 3)
    assert second.lambda_ == 2.0


def test_a_policy_starts_from_the_one_it_needs(tmp_path):
    recipe = recipe_of(methods={"sft": {}, "dpo": {}}, seeds=[1])
    sft, dpo = plan(recipe)
    assert job_config(sft, recipe, tmp_path).model == "some/model"
    assert job_config(dpo, recipe, tmp_path).model == str(model_folder(tmp_path, "sft,seed=1"))


@pytest.mark.parametrize(
    ("compare", "says"),
    [
        ({"methods": {"dpo": {}}}, "methods: dpo starts from the model of sft"),
        ({"methods": {"sft": {}, "ppo": {}}}, "methods: ppo learns from a reward model; add `reward: {}`"),
        ({"methods": {"reward": {}}}, "nothing to compare"),
        ({"methods": {"sft": {"lerning_rate": 1}}}, "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ({"methods": {"sft": {"epochs": 0}}}, r"compare\.methods\.sft: epochs: .*greater than or equal to 1"),
        ({"methods": {"rlhf": {}}}, r"compare\.methods\.rlhf"),
        ({"methods": {"sft": {}}, "lambdas": [1]}, "lambdas: are for orpo"),
        ({"seeds": [1, 1]}, r"seeds: a value stands twice in \[1, 1\]"),
        ({"seeds": []}, r"compare\.seeds"),
        ({"sedes": [1]}, "did you mean 'seeds'"),
    ],
)
def test_a_wrong_section_names_its_key(compare, says):
    with pytest.raises(UsageError, match=says) as caught:
        plan(recipe_of(**compare), "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "says"), [("train", "has no `train`"), ("compare", "has no `compare` section; add")]
)
def test_a_recipe_that_cannot_be_compared(missing, says):
    document = DOCUMENT | {"compare": {}}
    del document[missing]
    with pytest.raises(UsageError, match=says):
        plan(Recipe.parse(document), "my.yaml")


@pytest.mark.parametrize("name", [name for name in ready_recipes() if name.startswith("opt")])
def test_the_papers_small_models_are_compared_as_in_the_paper(name):
    recipe = Recipe.read(name)
    assert recipe.compare is not None
    assert {"reward", "judge", "sft", "dpo", "ppo", "orpo"} <= recipe.compare.methods.keys()
    assert recipe.compare.methods["sft"] == {"learning_rate": 1e-5, "epochs": 1}
