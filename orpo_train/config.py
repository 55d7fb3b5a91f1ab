"""Every setting of a training run, with a sentence each."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

ObjectiveName = Literal["orpo", "sft", "probability-ratio", "unlikelihood", "dpo", "ipo", "kto", "reward", "ppo"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)


class Sampling(_Settings):
    """How an answer to a prompt is drawn, token by token."""

    max_new_tokens: int = Field(default=128, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(default=1.0, ge=0, description="Logits are divided by it; 0: the likeliest token.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw among the likeliest tokens of this probability (arXiv 1904.09751)."
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="Seed of the draws; each prompt has a stream of its own.")


class LoraConfig(_Settings):
    """Low-rank adapters (arXiv 2106.09685), merged into the weights at the end."""

    rank: int = Field(default=16, ge=1, description="Inner dimension of an adapter.")
    alpha: float = Field(default=32, gt=0, description="An adapter is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before an adapter.")
    modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="Names of the linear layers that get one; never the output head."
    )
    quantize: Literal["nf4"] | None = Field(
        default=None, description="nf4 holds the frozen weights in 4 bits (QLoRA, arXiv 2305.14314)."
    )


class PpoConfig(_Settings):
    """Reinforcement learning from a reward model with PPO; a batch of `train.batch_size` prompts is a step."""

    reward_model: str = Field(description="The judge: a folder that objective reward made, or a hub id.")
    kl: float = Field(default=0.1, ge=0, description="Weight of the KL to the model that training starts from.")
    kl_target: float | None = Field(
        default=None, gt=0, description="Adapt the weight towards this KL of an answer in nats; null: it stays."
    )
    max_new_tokens: int = Field(default=128, ge=1, description="Most tokens of an answer.")
    epochs: int = Field(default=4, ge=1, description="Passes over the answers of a step.")
    minibatches: int = Field(default=4, ge=1, description="Updates in each of these passes.")
    clip: float = Field(default=0.2, gt=0, description="How far probability ratios and values may move in a step.")
    value_weight: float = Field(default=0.1, gt=0, description="Weight of the value head's loss.")
    gamma: float = Field(default=1.0, gt=0, le=1, description="Discount of later rewards.")
    gae_lambda: float = Field(default=0.95, ge=0, le=1, description="Bias against variance of the advantages.")


class TrainConfig(_Settings):
    """The `train` section of a recipe."""

    model: str = Field(description="Base model: a local folder or a hub id.")
    revision: str | None = Field(default=None, description="Commit of the model on the hub.")
    objective: ObjectiveName = Field(
        default="orpo",
        description="The loss, one of orpo_train.objectives; reward trains a reward model, ppo learns from one.",
    )
    lambda_: float = Field(default=0.1, ge=0, alias="lambda", description="Weight of the preference term.")
    beta: float = Field(
        default=0.1, gt=0, description="dpo, ipo (its tau) and kto: how closely the model is held to the reference."
    )
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
    micro_batch_tokens: int = Field(default=4096, ge=2, description="Most tokens per forward pass and process.")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="Most pairs per forward pass and process; null: as many as the tokens allow."
    )
    layout: Literal["auto", "flex", "sdpa", "plain"] = Field(
        default="auto",
        description="How pairs lie in memory. flex and sdpa run a prompt once and pack pairs without padding, by that "
        "attention backend; plain gives each sequence a row. auto takes the fastest that agrees with plain.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decay, on matrices only.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the mean.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the variance.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm.")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="bf16: matrix products in bfloat16 over fp32 weights and optimizer state."
    )
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations: less memory, more time.")
    compile: bool = Field(default=False, description="Fuse the model's layers with torch.compile.")
    lora: LoraConfig | None = Field(default=None, description="Train low-rank adapters in place of the weights.")
    ppo: PpoConfig | None = Field(default=None, description="Settings of objective ppo.")
    seed: int = Field(default=42, ge=0, lt=2**63, description="Seed of the data order and of all draws.")
    log_every: int = Field(default=1, ge=1, description="Steps between lines of metrics.")
    eval_every: int | None = Field(default=None, ge=1, description="Steps between evaluations; null: only at the end.")
    export: Literal["last", "best"] = Field(
        default="last", description="Which weights become the model: the last step's, or those of the best eval loss."
    )
    early_stopping: int | None = Field(
        default=None, ge=1, description="Stop after this many evaluations in a row without a better eval loss."
    )
    save_every: int | None = Field(default=None, ge=1, description="Steps between checkpoints; null: none.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Latest checkpoints that are kept.")
    resume_other_dataset: bool = Field(
        default=False, description="Go on from a checkpoint of another dataset; otherwise that is an error."
    )
    nonfinite_steps: int = Field(
        default=3, ge=1, description="Stop after this many steps in a row whose loss or gradient is not finite."
    )
    trackers: list[str] = Field(default=[], description="accelerate's trackers, e.g. tensorboard or wandb.")
    trust_remote_code: bool = Field(default=False, description="Allow a model's own code to run.")

    @model_validator(mode="before")
    @classmethod
    def _papers_rate_of_ppo(cls, settings: Any) -> Any:
        """The paper's learning rates: 1e-5 for PPO, 8e-6 for ORPO."""
        if isinstance(settings, dict) and settings.get("objective") == "ppo":
            return {"learning_rate": 1e-5} | settings
        return settings

    @model_validator(mode="after")
    def _ppo_has_a_judge(self) -> Self:
        if self.objective == "ppo" and self.ppo is None:
            raise ValueError("objective ppo needs ppo.reward_model, a folder that objective reward made")
        if self.objective == "ppo" and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing: objective ppo runs without dropout, where models do not have it")
        return self

    @model_validator(mode="after")
    def _evaluates_where_needed(self) -> Self:
        for setting in ("early_stopping", "export"):
            if getattr(self, setting) not in (None, "last") and self.eval_every is None:
                raise ValueError(f"{setting} {getattr(self, setting)!r} needs eval_every, steps between evaluations")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.max_steps is not None and (self.warmup_steps or 0) > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than max_steps ({self.max_steps})")
        return self

    @property
    def scalar_head(self) -> bool:
        """Whether the model ends in one score for a sequence, not in a vocabulary."""
        return self.objective == "reward"

    @property
    def needs_reference(self) -> bool:
        """Whether the dataset must have a reference model's log-probabilities."""
        return self.objective in ("dpo", "ipo", "kto")

    def warmup(self, total_steps: int) -> int:
        """Steps that warm up, of `total_steps`."""
        return self.warmup_steps if self.warmup_steps is not None else round(self.warmup_ratio * total_steps)
