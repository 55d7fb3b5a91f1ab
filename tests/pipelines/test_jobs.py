"""What is to be trained: from a recipe or from parts, once or for every combination of swept values."""

import pytest

from orpo_data.errors import UsageError
from pipelines.jobs import parse_sweeps, sweep_jobs, training_job


@pytest.fixture
def jobs_of(tmp_path):
    def jobs(*sweeps):
        return sweep_jobs(sweeps, None, tmp_path / "tokenize", "base", tmp_path, ["train.max_steps=3"])

    return jobs


# --- one job ---------------------------------------------------------------------------------------------------------


def test_job_of_a_recipe(recipe_file, tiny_model_dir, tmp_path):
    job = training_job(
        str(recipe_file(f"train={{model: {tiny_model_dir}}}")), None, "other", tmp_path, ["train.seed=3"]
    )
    assert (job.name, job.dataset, job.output) == ("test", tmp_path / "tokenize", tmp_path / "model")
    assert (job.config.model, job.config.seed) == ("other", 3)


def test_job_of_a_recipe_without_training(recipe_file):
    with pytest.raises(UsageError, match="has no `train` section"):
        training_job(str(recipe_file()), None, None, None, [])


def test_job_of_a_dataset_and_a_model(tmp_path):
    job = training_job(None, tmp_path / "tokenize", "m", None, ["train.lambda=0.5"])
    assert (job.output, job.config.model, job.config.lambda_) == (tmp_path / "model", "m", 0.5)
    with pytest.raises(UsageError, match=r"only train\.KEY=VALUE"):
        training_job(None, tmp_path / "tokenize", "m", None, ["lambda=0.5"])


# --- a sweep ---------------------------------------------------------------------------------------------------------


def test_values_are_split_at_commas():
    assert parse_sweeps(["lambda=0.1, 0.5,1.0", "train.seed=1"]) == {"lambda": ["0.1", "0.5", "1.0"], "seed": ["1"]}


@pytest.mark.parametrize("text", ["lambda", "lambda=", "=1", "lambda=1,,2", ""])
def test_other_forms_are_refused(text):
    with pytest.raises(UsageError, match=r"--sweep .*: write KEY=VALUE,VALUE"):
        parse_sweeps([text])


def test_a_key_twice_is_refused():
    with pytest.raises(UsageError, match="lambda stands twice; give all its values at once"):
        parse_sweeps(["lambda=1", "train.lambda=2"])


def test_several_sweeps_form_the_product(jobs_of, tmp_path):
    jobs = jobs_of("lambda=0,1.50", "objective=sft,orpo")
    assert list(jobs) == [
        "lambda=0.0,objective=sft", "lambda=0.0,objective=orpo", "lambda=1.5,objective=sft", "lambda=1.5,objective=orpo"
    ]  # fmt: skip
    last = jobs["lambda=1.5,objective=orpo"]
    assert (last.config.lambda_, last.config.objective, last.config.max_steps) == (1.5, "orpo", 3)
    assert last.output == tmp_path / "sweep" / "lambda=1.5,objective=orpo" / "model"


def test_a_sweep_of_a_recipe(recipe_file, tiny_model_dir, tmp_path):
    recipe = recipe_file(f"train={{model: {tiny_model_dir}, lambda: 0.3}}")
    jobs = sweep_jobs(["learning_rate=1e-5,2e-5"], str(recipe), None, "other", tmp_path, ["train.seed=3"])
    assert list(jobs) == ["learning_rate=1e-05", "learning_rate=2e-05"]
    for job in jobs.values():
        assert (job.dataset, job.config.model, job.config.seed) == (tmp_path / "tokenize", "other", 3)
        assert job.config.lambda_ == 0.3


def test_names_are_folders_even_of_hub_models(jobs_of):
    assert list(jobs_of("model=org/one,org/two", "max_steps=null,4")) == [
        "model=org-one,max_steps=null", "model=org-one,max_steps=4",
        "model=org-two,max_steps=null", "model=org-two,max_steps=4",
    ]  # fmt: skip


def test_settings_below_a_section(jobs_of):
    jobs = jobs_of("lora.rank=4,8")
    assert {name: job.config.lora.rank for name, job in jobs.items()} == {"lora.rank=4": 4, "lora.rank=8": 8}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lamda=0.1,0.5", r"unknown key 'lamda'; did you mean 'lambda'\?"),
        ("lambda=0.1,-1", r"lambda: .*greater than or equal to 0 \(it is -1\)"),
        ("objective=orpo,spo", r"objective: .*'orpo'.*\(it is 'spo'\)"),
        ("trackers=wandb,tensorboard", r"trackers: .*list"),
        ("lambda=0.5,0.50", r"--sweep: lambda=0\.5 stands twice"),
        ("lambda.x=1", "lambda: "),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_trained(jobs_of, orpo, tmp_path, text, says):
    with pytest.raises(UsageError, match=says):
        jobs_of(text)
    done = orpo("train", "--dataset", tmp_path / "nowhere", "--model", "base", "-o", tmp_path, "--sweep", text)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
