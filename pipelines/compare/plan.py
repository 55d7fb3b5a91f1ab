"""From a recipe to the jobs of a comparison, and which of them need which.

A job trains one model, or lets one trained policy answer the held-out prompts and be judged. Jobs that do not need each
other may run at the same time, on different machines.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from orpo_data.errors import UsageError
from orpo_train.config import TrainConfig
from pipelines.compare.config import POLICIES, CompareConfig, Method
from pipelines.documents import merge
from pipelines.recipe import Recipe, explain_errors

REWARD_MODELS = ("reward", "judge")
ANSWERS_NAME = "answers.json"


class Job(BaseModel):
    """One thing to do, as plain values: it may be done in another process."""

    model_config = ConfigDict(frozen=True)

    name: str  # also its folder below DIR/compare
    method: Method
    seed: int
    lambda_: float | None = None  # of orpo
    answers: bool = False  # let the policy answer and be judged; otherwise train it
    needs: tuple[str, ...] = ()  # names of jobs; a policy that another starts from is the first of them

    @property
    def label(self) -> str:
        """What its seeds have in common: a line of the table."""
        return self.method if self.lambda_ is None else f"{self.method} lambda={_shown(self.lambda_)}"


def _shown(value: float) -> str:
    """Every digit, for two values need two names."""
    return repr(value).removesuffix(".0")


def comparison(recipe: Recipe, origin: str = "recipe") -> CompareConfig:
    """The recipe's `compare` section; UsageError where it, or `train`, is missing or a method's settings are wrong."""
    if recipe.train is None:
        raise UsageError(f"{origin}: has no `train` section; compare starts from its model and settings")
    if recipe.compare is None:
        raise UsageError(f"{origin}: has no `compare` section; add `compare: {{}}` for SFT and ORPO")
    for method in recipe.compare.methods:
        method_config(recipe, method, origin)
    return recipe.compare


def method_config(recipe: Recipe, method: Method, origin: str = "recipe", **settings: Any) -> TrainConfig:
    """The `train` section as a method has it; `settings` come last."""
    assert recipe.train is not None
    assert recipe.compare is not None
    own: dict[str, Any] = {"objective": "reward" if method in REWARD_MODELS else method}
    if method == "ppo":
        own["ppo"] = {"reward_model": _reward_models(recipe.compare)[0]}
    values = merge(recipe.train.model_dump(mode="json", by_alias=True), own)
    values = merge(merge(values, recipe.compare.methods[method]), settings)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(explain_errors(TrainConfig, f"{origin}: compare.methods.{method}", error)) from None


def plan(recipe: Recipe, origin: str = "recipe") -> list[Job]:
    """The jobs of a comparison, each after those it needs; a worker that waits for one does nothing else meanwhile.

    >>> recipe.compare.methods, recipe.compare.seeds
    ({'reward': {}, 'sft': {}, 'dpo': {}}, [1])
    >>> [(job.name, job.needs) for job in plan(recipe)]
    [('reward', ()), ('sft,seed=1', ()), ('dpo,seed=1', ('sft,seed=1',)),
     ('sft,seed=1,answers', ('sft,seed=1', 'reward')), ('dpo,seed=1,answers', ('dpo,seed=1', 'reward'))]
    """
    settings = comparison(recipe, origin)
    reward_models = [
        Job(name=method, method=method, seed=method_config(recipe, method).seed)
        for method in REWARD_MODELS
        if method in settings.methods
    ]
    reward, judge = _reward_models(settings)
    policies = []
    for method in (method for method in POLICIES if method in settings.methods):
        for lambda_ in _lambdas(recipe, method):
            for seed in settings.seeds:
                variant = "" if lambda_ is None else f",lambda={_shown(lambda_)}"
                name = f"{method}{variant},seed={seed}"
                needs = {"dpo": (f"sft,seed={seed}",), "ppo": (f"sft,seed={seed}", reward)}.get(method, ())
                policies.append(Job(name=name, method=method, seed=seed, lambda_=lambda_, needs=needs))
    answers = [
        job.model_copy(update={"name": f"{job.name},answers", "answers": True, "needs": (job.name, judge)})
        for job in policies
    ]
    return [*reward_models, *policies, *(answers if judge else ())]


def _reward_models(settings: CompareConfig) -> tuple[str, str]:
    """Names of the jobs whose model ppo learns from, and whose model judges; empty where there is none."""
    reward, judge = (name if name in settings.methods else "" for name in REWARD_MODELS)
    return reward or judge, judge or reward


def _lambdas(recipe: Recipe, method: Method) -> list[float | None]:
    """ORPO's own lambda and those of the sweep, each once; other methods have none."""
    if method != "orpo":
        return [None]
    assert recipe.compare is not None
    return [*dict.fromkeys([method_config(recipe, "orpo").lambda_, *recipe.compare.lambdas])]


def job_config(job: Job, recipe: Recipe, root: Path) -> TrainConfig:
    """The settings of a job's training."""
    settings: dict[str, Any] = {"seed": job.seed}
    if job.lambda_ is not None:
        settings["lambda"] = job.lambda_
    if job.method in ("dpo", "ppo"):
        settings["model"], settings["revision"] = str(model_folder(root, job.needs[0])), None
    if job.method == "ppo":
        settings["ppo"] = {"reward_model": str(model_folder(root, job.needs[1]))}
    return method_config(recipe, job.method, **settings)


def model_folder(root: Path, name: str) -> Path:
    """Where the model of a training job lies."""
    return root / "compare" / name / "model"


def answers_folder(root: Path, job: Job) -> Path:
    return root / "compare" / job.needs[0] / "answers"
