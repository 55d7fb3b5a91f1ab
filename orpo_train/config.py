"""Every setting of a training run, with a sentence each."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainConfig(BaseModel):
    """The `train` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    model: str = Field(description="Base model: a local folder or a hub id.")
    revision: str | None = Field(default=None, description="Commit of the model on the hub.")
    objective: Literal["orpo", "sft"] = Field(default="orpo", description="sft leaves the odds ratio out of the loss.")
    lambda_: float = Field(default=0.1, ge=0, alias="lambda", description="Weight of the odds ratio loss.")
    nll_scope: Literal["response", "prompt+response"] = Field(
        default="response", description="Tokens of the chosen side that the supervised loss covers."
    )
    nll_reduction: Literal["sequence", "token"] = Field(
        default="sequence", description="Supervised loss: mean of the sequences' means, or of the batch's tokens."
    )
    learning_rate: float = Field(default=8e-6, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = Field(
        default="cosine", description="Course of the learning rate after warmup."
    )
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps that warm up.")
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps that warm up; overrides warmup_ratio.")
    epochs: int = Field(default=1, ge=1, description="Passes over the training pairs.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many steps, within `epochs`.")
    batch_size: int = Field(default=64, ge=1, description="Pairs per optimizer step, over all processes.")
    micro_batch_size: int = Field(default=4, ge=1, description="Pairs per forward pass and process; memory only.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decay, on matrices only.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the mean.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the variance.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm.")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="bf16: matrix products in bfloat16 over fp32 weights and optimizer state."
    )
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations: less memory, more time.")
    seed: int = Field(default=42, description="Seed of the data order and of dropout.")
    log_every: int = Field(default=1, ge=1, description="Steps between lines of metrics.")
    eval_every: int | None = Field(default=None, ge=1, description="Steps between evaluations; null: only at the end.")
    save_every: int | None = Field(default=None, ge=1, description="Steps between checkpoints; null: none.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Latest checkpoints that are kept.")
    trackers: list[str] = Field(default=[], description="accelerate's trackers, e.g. tensorboard or wandb.")
    trust_remote_code: bool = Field(default=False, description="Allow a model's own code to run.")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.max_steps is not None and (self.warmup_steps or 0) > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than max_steps ({self.max_steps})")
        return self

    @property
    def weight_of_odds(self) -> float:
        """lambda, or 0 where the objective has no odds ratio."""
        return self.lambda_ if self.objective == "orpo" else 0.0

    def warmup(self, total_steps: int) -> int:
        """Steps that warm up, of `total_steps`."""
        return self.warmup_steps if self.warmup_steps is not None else round(self.warmup_ratio * total_steps)
