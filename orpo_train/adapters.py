"""Low-rank adapters: LoRA (arXiv 2106.09685), on 4-bit base weights QLoRA (arXiv 2305.14314), by peft and bitsandbytes.

Adapters go into the model's own linear layers. The model keeps its class, its body and its head, so that it is scored
like any other; a `PeftModel` around it would not be.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orpo_data.errors import OrpoError, UsageError
from orpo_data.extras import require_package
from orpo_train.checkpoint import set_weights
from orpo_train.config import LoraConfig, TrainConfig
from orpo_train.model import load_model
from orpo_train.reward import load_reward_model


def load_base(config: TrainConfig) -> Any:
    """The model that a run starts from, in fp32; with `lora.quantize` its linear layers in 4 bits, on the accelerator.

    Raises OrpoError when it cannot be loaded, UsageError when `lora` needs a package that is not installed.
    """
    if config.lora is not None:
        _check_installed(config.lora)
    model = _load(config)
    return quantize_nf4(model) if config.lora is not None and config.lora.quantize else model


def _load(config: TrainConfig) -> Any:
    """With the head that the objective needs; a new one is drawn from the run's seed, the same in every process."""
    if config.scalar_head:
        torch.manual_seed(config.seed)
    load = partial(load_reward_model, new_head=True) if config.scalar_head else load_model
    model = load(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    if any(weight.dtype != torch.float32 for weight in model.parameters()):
        raise OrpoError(f"train.model: {config.model!r} holds quantized weights; name the model that it was made of")
    return model


def attach_lora(model: Any, lora: LoraConfig) -> Any:
    """The same model with fp32 adapters that change nothing yet (B = 0); all its own weights are frozen, but for a
    scalar head.

    Raises UsageError if `lora.modules` names the output head or no linear layer, or where peft cannot adapt them so.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    names = adapted_layers(model, lora.modules)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),  # GPT-2 stores its matrices transposed
    )
    try:
        adapted = peft.inject_adapter_in_model(settings, model)
    except ValueError as error:  # fused experts take no dropout, for example
        raise UsageError(f"train.lora: {error}") from None
    if model.get_output_embeddings() is None:  # a scalar head is new, nothing is known by it yet
        model.score.requires_grad_(True)
    return adapted


def merge_lora(adapters: dict[str, Tensor], config: TrainConfig) -> Any:
    """The base model, loaded again in fp32, with W + (alpha / rank) B A in place of each adapted W.

    `adapters` are the trained weights of a model that `load_base` and `attach_lora` made from `config`. Without
    quantization the merged model computes what that one computes, to rounding. Adapters of a quantized model were
    trained on top of W rounded to 4 bits and are merged into W itself: this takes the rounding of all layers back, so
    log-probabilities differ from the trained model's by about as much as quantization had moved the base model's.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert config.lora is not None
    model = attach_lora(_load(config), config.lora)
    set_weights(model, adapters, Path(config.model))
    for name, layer in reversed(list(model.named_modules())):  # of fused experts one lies in another
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model


def adapted_layers(model: Any, modules: list[str] | Literal["all-linear"]) -> list[str]:
    """Full names of the linear layers that `modules` means; a name stands for all layers whose path ends with it."""
    linears = list(body_linears(model))
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    chosen = set(linears) if modules == "all-linear" else set()
    for wanted in modules if modules != "all-linear" else ():
        if _ending(heads, wanted):
            raise UsageError(
                f"train.lora.modules: {wanted!r} is the output head, where an adapter gets no gradient; leave it out"
            )
        if not (found := _ending(linears, wanted)):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise UsageError(f"train.lora.modules: no linear layer is named {wanted!r}; there are {known}")
        chosen.update(found)
    if not chosen:
        raise UsageError(f"train.lora.modules: {modules!r} names no linear layer of {type(model).__name__}")
    return [name for name in linears if name in chosen]


def quantize_nf4(model: Any) -> Any:
    """The same model on the accelerator, the linear layers of its body in 4-bit NormalFloat with quantized scales.

    Embeddings, norms, biases and the head stay in fp32.
    """
    import bitsandbytes as bnb
    from transformers.pytorch_utils import Conv1D

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    for name, layer in body_linears(model).items():
        weight = layer.weight.detach().T.contiguous() if isinstance(layer, Conv1D) else layer.weight.detach()
        outputs, inputs = weight.shape
        packed = bnb.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", device="meta")
        packed.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, module=packed)
        packed.bias = layer.bias
        packed.support_avx512bf16_for_cpu = False  # evaluation would repack the weights into a form without gradients
        packed.register_forward_pre_hook(_follow_autocast)
        model.set_submodule(name, packed.to(device))  # this quantizes
    model.is_loaded_in_4bit = True  # peft looks here
    return model.to(device)


def _follow_autocast(layer: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Autocast does not reach bitsandbytes' kernels; its layers compute as a Linear would."""
    device = inputs[0].device.type
    layer.compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return (inputs[0].to(layer.compute_dtype),)


def body_linears(model: Any) -> dict[str, Any]:
    """All linear layers before the output head, by full name."""
    from transformers.pytorch_utils import Conv1D

    body = set(model.base_model.modules()) - {model.get_output_embeddings()}
    linear = (nn.Linear, Conv1D)
    return {name: module for name, module in model.named_modules() if module in body and isinstance(module, linear)}


def _ending(names: list[str], wanted: str) -> list[str]:
    return [name for name in names if f".{name}".endswith(f".{wanted}")]


def _check_installed(lora: LoraConfig) -> None:
    extra, packages = ("qlora", ("peft", "bitsandbytes")) if lora.quantize else ("lora", ("peft",))
    for package in packages:
        require_package(package, extra, "train.lora")
    # on some CPUs it asks for a package that fetches kernels from the hub; nothing here runs them
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
