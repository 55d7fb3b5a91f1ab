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
from torch import Tensor, nn

from orpo_data.errors import OrpoError
from orpo_train.adapters import attach_lora, body_linears
from orpo_train.attention import use_packed_attention
from orpo_train.batching import BatchOrder, PairDataset, micro_batches
from orpo_train.config import TrainConfig
from orpo_train.layout import Batch, collate_packed, collate_plain
from orpo_train.logprobs import CHUNK_LOGITS
from orpo_train.model import PLAIN, rounded_up
from orpo_train.run import limits_of, sides_of

Sharding = Literal["none", "optimizer", "all"]
"""What is held in pieces, one in each process: nothing (DDP), gradients and optimizer (ZeRO-2), weights too (FSDP)."""

STATUS = Path("/proc/self/status")
FP32 = 4
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, a scale of 8 bits for 64, one of 32 for 256 of those
HEAP_GAPS = 0.7  # of what comes and goes with a forward pass: passes differ in size, and the heap keeps what is freed
LIBRARIES = 75 * 2**20  # compiled kernels and working memory of the matrix libraries
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
    whole: int  # weights that a process has whole for a while where it holds but a piece of each
    several_passes: bool = True  # an optimizer step has several forward passes: gradients are there during the next one

    @property
    def allocator(self) -> int:
        """What lies between the pieces in use, and what libraries keep; as measured on the CPU."""
        passing = self.activations + self.head
        return 0 if torch.accelerator.is_available() else round(HEAP_GAPS * passing) + LIBRARIES

    @property
    def total(self) -> int:
        return self._in_use + self.allocator

    @property
    def _in_use(self) -> int:
        passing = self.activations + self.head
        last = passing + self.gradients if self.several_passes else max(passing, self.gradients)
        return self.weights + self.optimizer + last  # in a single pass gradients come as activations go


def estimate_memory(config: TrainConfig, base: Path, data: PairDataset) -> MemoryEstimate:
    """What a run of `config` on `data` needs in a single process.

    `base` is the model's local folder, of which only the configuration is read. Raises OrpoError where transformers
    does not know the model, and for ppo.
    """
    if config.objective == "ppo":
        raise OrpoError("objective ppo is not estimated: it also holds a reference, a reward model and answers' caches")
    model = _empty_model(config, base)
    linears = sum(layer.weight.numel() for layer in body_linears(model).values())
    outside, layer = _outside_and_layer(model)
    if config.lora:
        attach_lora(model, config.lora)
    parameters = [*model.parameters()]
    count, trained = (sum(p.numel() for p in group) for group in (parameters, _trained(parameters)))
    batch, several = largest_pass(config, data)
    weights = FP32 * count
    if config.lora and config.lora.quantize:
        weights -= round((FP32 - NF4) * linears)
    return MemoryEstimate(
        parameters=count,
        trained=trained,
        tokens=batch.input_ids.numel(),
        weights=weights,
        gradients=FP32 * trained,
        optimizer=2 * FP32 * trained,
        activations=_activations(model, config, batch, linears),
        head=_head_bytes(model, config, len(batch.positions)),
        whole=FP32 * (outside + 2 * layer),
        several_passes=several,
    )


def in_pieces(estimate: MemoryEstimate, sharding: Sharding, processes: int) -> MemoryEstimate:
    """The estimate for each of several processes, each with forward passes as large."""
    if sharding == "none" or processes == 1:
        return estimate
    cut = replace(estimate, gradients=estimate.gradients // processes, optimizer=estimate.optimizer // processes)
    return cut if sharding == "optimizer" else replace(cut, weights=estimate.weights // processes + estimate.whole)


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
    """The model of a folder's configuration in fp32, on the device of tensors without contents."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if config.scalar_head else AutoModelForCausalLM
    settings = {"num_labels": 1} if config.scalar_head else {}
    try:
        known = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code, **settings)
        with torch.device("meta"):
            return kind.from_config(known, dtype=torch.float32, trust_remote_code=config.trust_remote_code).train()
    except (OSError, ValueError) as error:
        raise OrpoError(f"train.model: {str(base)!r}: {str(error).strip().splitlines()[0]}") from None


def _trained(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _outside_and_layer(model: Any) -> tuple[int, int]:
    """Numbers of weights outside of the model's layers, and in the largest of them."""
    names = set(model._no_split_modules or ())
    layers = [
        sum(p.numel() for p in module.parameters()) for module in model.modules() if type(module).__name__ in names
    ]
    whole: int = sum(p.numel() for p in model.parameters())
    return whole - sum(layers), max(layers, default=0)


def _activations(model: Any, config: TrainConfig, batch: Batch, linears: int) -> int:
    """Bytes that autograd keeps of a forward pass through the body, whose linear layers have `linears` weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, torch.UntypedStorage] = {}
    weights: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    half = config.precision == "bf16"
    if batch.branches is not None:
        use_packed_attention(model, "sdpa")
    with FakeTensorMode(allow_non_fake_inputs=True):
        _as_if_on_the_cpu(model)
        weights |= {p.untyped_storage()._cdata for p in model.parameters()}
        packed = {} if batch.branches is None else {"branches": batch.branches}
        asked = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids, "use_cache": False}
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=half), hooks:
            hidden = model.base_model(input_ids=batch.input_ids, **asked, **packed).last_hidden_state
        whole = sum(storage.nbytes() for storage in kept.values())
    if not config.gradient_checkpointing:
        return whole
    copies = 2 * linears if half else 0  # in bf16, which autocast keeps
    layers = model.config.num_hidden_layers  # each keeps its input, and one at a time is run again
    return int(layers * hidden.numel() * FP32 + (whole - copies) / layers + copies)


def _as_if_on_the_cpu(model: nn.Module) -> None:
    """Inside FakeTensorMode: tensors that have no contents, but a device; what shared its weights does so again."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                own[name] = None if tensor is None else made[id(tensor)]


def _head_bytes(model: Any, config: TrainConfig, positions: int) -> int:
    """Bytes at work while log-probabilities are read back: see logprobs.py."""
    head = model.get_output_embeddings()
    if head is None:
        return 0
    half = config.precision == "bf16"
    vocabulary, width = head.weight.shape
    logits = min(CHUNK_LOGITS, positions * vocabulary)
    copies = (2 if half else 0) + ((FP32 + (2 if half else FP32)) if head.weight.requires_grad else 0)
    at_work: int = vocabulary * width * copies + logits * (FP32 + (2 * 2 if half else 0)) + 2 * positions * width * FP32
    return at_work


def peak_memory() -> int:
    """Most bytes that this process has held so far: on a GPU where there is one, or else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # Linux; getrusage counts there what the process that started this one held
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
