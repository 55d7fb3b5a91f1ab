"""The `compare` section of a recipe."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from orpo_train.config import Sampling

Method = Literal["reward", "judge", "sft", "dpo", "ppo", "orpo"]

POLICIES: tuple[Method, ...] = ("sft", "dpo", "ppo", "orpo")
"""In the order of the paper's tables; the other methods train reward models."""


class CompareConfig(BaseModel):
    """What `orpo compare` trains, and how it is judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: dict[Method, dict[str, Any]] = Field(
        default={"sft": {}, "orpo": {}},
        description="What is trained, each with the keys of `train` that it has other values for. reward is the reward "
        "model that ppo learns from, judge the one that judges; where one of the two is missing the other stands in.",
    )
    lambdas: list[float] = Field(default=[], description="Further lambdas that orpo is trained with.")
    seeds: list[int] = Field(default=[42], min_length=1, description="Every policy is trained once for each.")
    prompts: int = Field(default=200, ge=1, description="Most held-out prompts that the policies answer.")
    sampling: Sampling = Field(default=Sampling(), description="How the answers are drawn; its seed is the first.")
    draws: int = Field(default=1, ge=1, description="Answers to each prompt, each drawn with a seed of its own.")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for name in ("seeds", "lambdas"):
            values = getattr(self, name)
            if len({*values}) < len(values):
                raise ValueError(f"{name}: a value stands twice in {values}")
        return self

    @model_validator(mode="after")
    def _have_what_they_start_from(self) -> Self:
        if not any(method in self.methods for method in POLICIES):
            raise ValueError(f"methods: none of {', '.join(POLICIES)} is there, so there is nothing to compare")
        for method in ("dpo", "ppo"):
            if method in self.methods and "sft" not in self.methods:
                raise ValueError(f"methods: {method} starts from the model of sft; add `sft: {{}}`")
        if "ppo" in self.methods and not {"reward", "judge"} & self.methods.keys():
            raise ValueError("methods: ppo learns from a reward model; add `reward: {}`")
        if self.lambdas and "orpo" not in self.methods:
            raise ValueError("lambdas: are for orpo, which is not among the methods")
        return self
