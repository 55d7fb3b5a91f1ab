"""What a training run needs of memory: estimated before it starts, and read afterwards.

The estimate runs the model's body on tensors without contents (PyTorch's FakeTensorMode) over the run's own largest
forward pass and counts what autograd would keep: no formula of any architecture, and no memory.
"""

import resource
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from orpo_data.errors import OrpoError
from orpo_train.adapters import attach_lora, body_linears
from orpo_train.attention import use_packed_attention
from orpo_train.batching import BatchOrder, PairDataset, micro_batches
from orpo_train.config import TrainConfig
from orpo_train.layout import Batch, collate_packed, collate_plain
from orpo_train.logprobs import CHUNK_LOGITS
from orpo_train.model import PLAIN, rounded_up
from orpo_train.objectives import OBJECTIVES
from orpo_train.run import limits_of, sides_of

Sharding = Literal["none", "optimizer", "all"]
"""What is held in pieces, one for each process: nothing (DDP), gradients and optimizer (ZeRO-2), weights too (FSDP, ZeRO-3)."""

STATUS = Path("/proc/self/status")
FP32 = 4
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, a scale of 8 bits for 64, one of 32 for 256 of those
PLANNED_STEPS = 50  # whose batches are looked through for the largest forward pass


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs at its peak, beyond what the loaded libraries take."""

    parameters: int  # number of them
    trained: int  # number of those that get gradients
    tokens: int  # of the largest forward pass
    weights: int
    gradients: int
    optimizer: int  # AdamW's mean and variance
    activations: int  # what the forward pass keeps for the backward pass
    head: int  # chunks of logits, and the output embedding's gradient and its copy in the products' precision
    gathered: int = 0  # weights of the layers at work, where others hold the pieces
    several_passes: bool = True  # an optimizer step has several forward passes: gradients are there during the next one

    @property
    def total(self) -> int:
        passing = self.activations + self.head
        if not self.several_passes:  # gradients come as activations go
            return self.weights + self.optimizer + self.gathered + max(passing, self.gradients)
        return self.weights + self.optimizer + self.gathered + passing + self.gradients


def estimate_memory(config: TrainConfig, base: Path, data: PairDataset) -> MemoryEstimate:
    """What a run of `config` on `data` needs in a single process.

    `base` is the model's local folder, of which only the configuration is read. Raises OrpoError where transformers
    does not know the model.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch, several = largest_pass(config, data)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _empty_model(config, base)
        linears = sum(layer.weight.numel() for layer in body_linears(model).values())
        if config.lora:
            attach_lora(model, config.lora)
        parameters = list(model.parameters())
        count = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        kept = _activations(model, config, batch)
        head = _head_bytes(model, config, len(batch.positions))
    weights = FP32 * count
    if config.lora and config.lora.quantize:
        weights -= round((FP32 - NF4) * linears)
    rows, width = batch.input_ids.shape
    return MemoryEstimate(
        parameters=count,
        trained=trained,
        tokens=rows * width,
        weights=weights,
        gradients=FP32 * trained,
        optimizer=2 * FP32 * trained,
        activations=kept,
        head=head,
        several_passes=several,
    )


def in_pieces(estimate: MemoryEstimate, sharding: Sharding, processes: int, gathered: int) -> MemoryEstimate:
    """The estimate for each of several processes; `gathered` bytes of weights are whole at a time where all is cut up."""
    if sharding == "none" or processes == 1:
        return estimate
    cut = {"gradients": estimate.gradients // processes, "optimizer": estimate.optimizer // processes}
    if sharding == "all":
        cut |= {"weights": estimate.weights // processes, "gathered": gathered}
    return replace(estimate, **cut)


def gathered_bytes(config: TrainConfig, base: Path) -> int:
    """Weights that FSDP and ZeRO-3 hold whole in each process: what lies outside the layers, and two layers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _empty_model(config, base)
        names = set(model._no_split_modules or ())
        layers = [
            sum(p.numel() for p in module.parameters()) for module in model.modules() if type(module).__name__ in names
        ]
        outside = sum(p.numel() for p in model.parameters()) - sum(layers)
    return FP32 * (outside + 2 * max(layers, default=0))


def largest_pass(config: TrainConfig, data: PairDataset) -> tuple[Batch, bool]:
    """The forward pass with most tokens of a run's first steps, and whether a step has several passes."""
    packed = config.layout != PLAIN
    order = BatchOrder(data, config.batch_size, config.seed)
    largest, tokens, several = None, 0, False
    for step in range(min(PLANNED_STEPS, config.max_steps or PLANNED_STEPS)):
        passes = micro_batches(data, order.batch(step), sides_of(config), limits_of(config), packed=packed)
        several |= len(passes) > 1
        for micro in passes:
            size = sum(sum(len(data.ids(pair, side)) for pair, side in tree.responses) for tree in micro.trees)
            if size > tokens:
                largest, tokens = micro, size
    assert largest is not None
    collate = collate_packed if packed else collate_plain
    return rounded_up(collate(data, largest.trees, config.nll_scope)), several


def _empty_model(config: TrainConfig, base: Path) -> Any:
    """The model of a folder's configuration, in fp32, inside FakeTensorMode."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    scalar = OBJECTIVES[config.objective].scalar_head
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    settings = {"num_labels": 1} if scalar else {}
    try:
        known = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code, **settings)
        return kind.from_config(known, dtype=torch.float32, trust_remote_code=config.trust_remote_code).train()
    except (OSError, ValueError) as error:
        raise OrpoError(f"train.model: {str(base)!r}: {str(error).strip().splitlines()[0]}") from None


def _activations(model: Any, config: TrainConfig, batch: Batch) -> int:
    """Bytes that autograd keeps of a forward pass through the body."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    if batch.branches is not None:
        use_packed_attention(model, "sdpa")
    packed = {} if batch.branches is None else {"branches": batch.branches}
    asked = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids, "use_cache": False}
    half = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")
    with half, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(input_ids=batch.input_ids, **asked, **packed).last_hidden_state
    whole = sum(storage.nbytes() for storage in kept.values())
    if not config.gradient_checkpointing:
        return whole
    layers = model.config.num_hidden_layers  # each keeps its input, and one at a time is run again
    return int(layers * hidden.numel() * FP32 + whole / layers)


def _head_bytes(model: Any, config: TrainConfig, positions: int) -> int:
    """Bytes at work while log-probabilities are read back: see logprobs.py."""
    head = model.get_output_embeddings()
    if head is None:
        return 0
    half = config.precision == "bf16"
    vocabulary, width = head.weight.shape
    logits = min(CHUNK_LOGITS, positions * vocabulary)
    copies = (2 if half else 0) + ((FP32 + (2 if half else FP32)) if head.weight.requires_grad else 0)
    return vocabulary * width * copies + logits * (FP32 + (2 * 2 if half else 0)) + 2 * positions * width * FP32


def peak_memory() -> int:
    """Most bytes that this process has held so far: on a GPU where there is one, or else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # Linux; getrusage counts there what the process that started this one held
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
