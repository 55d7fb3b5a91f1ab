"""A training run before its first step: model, data and optimizer, checked against each other."""

import ctypes
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed

from orpo_data.errors import OrpoError
from orpo_data.schema import ANSWERS
from orpo_train import zero
from orpo_train.adapters import attach_lora, load_base
from orpo_train.batching import (
    KL_COLUMNS,
    REFERENCE_COLUMNS,
    BatchOrder,
    IntArray,
    Limits,
    PairDataset,
    batches_per_epoch,
    check_limits,
)
from orpo_train.config import TrainConfig
from orpo_train.model import PLAIN, Scorer, SequenceScorer, check_fits, choose_layout
from orpo_train.objectives import OBJECTIVES, Objective
from orpo_train.reward import RewardScorer


@dataclass(frozen=True)
class Run:
    """Everything a step needs."""

    config: TrainConfig
    accelerator: Accelerator
    scorer: torch.nn.Module
    optimizer: Any
    data: PairDataset
    held_out: PairDataset | None
    order: BatchOrder
    layout: str
    total: int  # planned optimizer steps

    @property
    def model(self) -> Any:
        return self.bare_scorer.model

    @property
    def trained(self) -> torch.nn.Module:
        """What checkpoints hold."""
        model: torch.nn.Module = self.model
        return model

    @property
    def bare_scorer(self) -> Scorer:
        bare: Scorer = self.accelerator.unwrap_model(self.scorer)
        return bare

    @property
    def zero(self) -> bool:
        return zero.in_use(self.accelerator)

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.config.objective]

    @property
    def weight(self) -> float:
        """What the objective's loss is given beside the pairs."""
        weights = {"lambda": self.config.lambda_, "beta": self.config.beta, None: 1.0}
        return weights[self.objective.weight]

    @property
    def sides(self) -> tuple[str, ...]:
        return sides_of(self.config)

    def restore(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Go on after the steps that these lines of metrics tell of."""

    def seen(self, steps: int) -> dict[str, int]:
        """Pairs and tokens that `steps` steps read, and sequences that ran through a model, repeats counted.

        Tokens of a shared prompt count with each sequence.
        """
        batches = [self.order.batch(step) for step in range(steps)]
        pairs = sum(map(len, batches))
        passes = pairs * (len(self.sides) + self.objective.needs_kl)
        return {"pairs": pairs, "tokens": sum(map(self.tokens_of, batches)), "forward_passes": passes}

    def tokens_of(self, batch: IntArray) -> int:
        """Tokens of a batch's sequences."""
        return sum(int(self.data.lengths[side][batch].sum()) for side in self.sides)

    @property
    def limits(self) -> Limits:
        return limits_of(self.config)


def set_up(
    config: TrainConfig,
    train_table: pa.Table,
    eval_table: pa.Table | None,
    work_dir: Path,
    kind: type[Scorer] | None = None,
) -> Run:
    """Model, data and optimizer, checked against each other before any step.

    `kind` of scorer runs the model; by default the one that the objective's head asks for.
    """
    if not torch.accelerator.is_available():
        keep_freed_memory()
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run may have left another configuration
    accelerator = Accelerator(
        mixed_precision="no",  # the scorer sees to it
        log_with=config.trackers or None,
        project_dir=work_dir,
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if zero.in_use(accelerator):
        zero.configure(accelerator, config)
    set_seed(config.seed)
    data = PairDataset(train_table)
    held_out = PairDataset(eval_table) if eval_table is not None and len(eval_table) else None
    read = [(data, sides_of(config)), *([(held_out, ANSWERS)] if held_out else [])]
    for pairs, _ in read:
        check_columns(pairs, config.objective)
    if config.objective in OBJECTIVES and OBJECTIVES[config.objective].needs_kl:
        read += [(pairs.kl, ANSWERS[:1]) for pairs, _ in read]
    model: Any = load_base(config).to(accelerator.device)
    for pairs, _ in read:
        check_fits(model, pairs)
    kind = kind or (RewardScorer if config.scalar_head else SequenceScorer)
    layout = choose_layout(model, data, config.layout, kind)
    for pairs, sides in read:
        check_limits(pairs, sides, config.micro_batch_tokens, packed=layout != PLAIN)
    if config.lora:
        attach_lora(model, config.lora)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if config.compile:
        compile_layers(model)
    bare = kind(model, layout, config.precision).to(accelerator.device)
    optimizer = make_optimizer(bare, config)
    if zero.in_use(accelerator) and not config.scalar_head:
        zero.announce_head(bare)
    scorer, optimizer = accelerator.prepare(bare, optimizer)
    scorer.train()
    order = BatchOrder(data, config.batch_size, config.seed)
    return Run(config, accelerator, scorer, optimizer, data, held_out, order, layout, total_steps(config, len(data)))


def check_columns(data: PairDataset, objective: str) -> None:
    """OrpoError naming the command that makes what the dataset lacks."""
    needs = OBJECTIVES.get(objective)
    columns = (*REFERENCE_COLUMNS, *KL_COLUMNS) if needs and needs.needs_kl else REFERENCE_COLUMNS
    if needs and needs.needs_reference and not data.has(columns):
        lacking = next(name for name in columns if not data.has([name]))
        raise OrpoError(
            f"the dataset has no values in {lacking}, objective {objective} needs them: "
            f"`orpo stage reference RECIPE --set train.objective={objective}`, and train on its output"
        )


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed: each step takes and frees the same gigabytes, and fresh pages cost time.

    Returns whether that was done; other C libraries have no such call.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # numbers of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, -1))


def process_state() -> PartialState:
    """Rank and number of processes as the launcher set them; without an accelerator they meet over gloo on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def sides_of(config: TrainConfig) -> tuple[str, ...]:
    """The sides of a pair that training runs through the model."""
    chosen_only = config.objective not in OBJECTIVES or not OBJECTIVES[config.objective].needs_rejected
    return ANSWERS[:1] if chosen_only else ANSWERS


def limits_of(config: TrainConfig) -> Limits:
    """What a forward pass may hold."""
    return Limits(config.micro_batch_tokens, config.micro_batch_size)


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; decay acts on matrices, not on biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def compile_layers(model: Any) -> None:
    """torch.compile of each layer by itself: they share one compilation, and attention stays outside of it."""
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            module.compile(dynamic=True)


def total_steps(config: TrainConfig, pairs: int) -> int:
    """Optimizer steps of a run; a last short batch of an epoch is a step too."""
    steps = config.epochs * batches_per_epoch(pairs, config.batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps
