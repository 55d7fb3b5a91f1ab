"""DeepSpeed's ZeRO: an engine of its own reduces gradients, clips, steps, and keeps the optimizer in pieces."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from orpo_data.errors import OrpoError
from orpo_train.config import TrainConfig


def in_use(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def configure(accelerator: Accelerator, config: TrainConfig) -> None:
    """Settings that the engine wants to know early. Afterwards models are loaded whole again.

    accelerate tells transformers of ZeRO-3, which would then cut up every model while loading it: none could be
    checked against the data, or loaded by one process alone. Raises OrpoError for what ZeRO cannot do here.
    """
    if config.save_every:
        raise OrpoError(
            "train.save_every: DeepSpeed's checkpoints are pickles, which are never read here; "
            "launch with orpo_train/launch/fsdp2.yaml, or set it to null"
        )
    from transformers.integrations import unset_hf_deepspeed_config

    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = 1  # a divisor to the engine; the trainer scales its losses itself
    settings["gradient_clipping"] = config.max_grad_norm
    unset_hf_deepspeed_config()


def announce_head(scorer: Any) -> None:
    """Let the engine gather the head's weight for the scorer, which reads it outside of the head's own forward pass."""
    from deepspeed.runtime.zero import register_external_parameter

    register_external_parameter(scorer, scorer.model.get_output_embeddings().weight)


def backward(engine: Any, loss: Tensor, *, last: bool) -> None:
    """Gradients are reduced over processes as they come; `last` ends the global batch."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)


def step(engine: Any) -> float:
    """Clip and update; returns the gradient's norm. When it is not finite the engine leaves the weights as they are."""
    engine.step()
    return float(engine.get_global_grad_norm())


def whole(weight: Tensor) -> Tensor:
    """A weight that may lie in pieces (ZeRO-3), in fp32. Every process must call it."""
    if not hasattr(weight, "ds_id"):
        return weight
    from deepspeed.utils import safe_get_full_fp32_param

    full: Tensor = safe_get_full_fp32_param(weight)
    return full
