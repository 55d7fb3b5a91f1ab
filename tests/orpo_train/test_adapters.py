"""Adapters: they begin as nothing, alone are trained, and end in a plain model that computes what they computed."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orpo_data.errors import OrpoError, UsageError
from orpo_train import adapters
from orpo_train.adapters import attach_lora, load_base, merge_lora
from orpo_train.checkpoint import trained_weights
from orpo_train.config import LoraConfig, TrainConfig

Make = Callable[..., Any]
KINDS = pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "opt", "opt-projected"])
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
BOTH_BASES = pytest.mark.parametrize("quantize", [None, pytest.param("nf4", marks=needs_bitsandbytes)])
IDS = torch.arange(30).reshape(2, 15)


@pytest.fixture
def make_lora(make_config: Make, model_folder: Make) -> Make:
    """Settings of a run with adapters on a tiny model."""

    def make(kind: str = "llama", **lora: Any) -> TrainConfig:
        return make_config(model=str(model_folder(kind, 10.0)), lora={"rank": 4, "alpha": 6} | lora)  # type: ignore[no-any-return]

    return make


@pytest.fixture
def take_steps(fast_loss: Make, make_table: Make) -> Make:
    """A few optimizer steps on five random pairs; returns the losses."""

    def take(model: Any, config: TrainConfig, steps: int = 3) -> list[float]:
        table: pa.Table = make_table(5)
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = fast_loss(model.train(), table, config)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return take


def start(config: TrainConfig) -> Any:
    assert config.lora is not None
    torch.manual_seed(1)
    return attach_lora(load_base(config), config.lora)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def fill(model: Any) -> None:
    """Adapters with weights everywhere: where B = 0, A would get no gradient."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.05)


@KINDS
@BOTH_BASES
def test_before_a_step_the_model_is_the_base(kind: str, quantize: str | None, make_lora: Make) -> None:
    config = make_lora(kind, quantize=quantize)
    model, base = start(config), load_base(config)
    assert type(model) is type(base)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=0)


@KINDS
@BOTH_BASES
def test_only_adapters_are_trained_and_the_head_has_none(kind: str, quantize: str | None, make_lora: Make) -> None:
    model = start(make_lora(kind, quantize=quantize))
    trained = trained_weights(model)
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    per_layer = {"gpt2": 4, "opt": 6, "opt-projected": 6}.get(kind, 7)
    projections = 2 if kind == "opt-projected" else 0
    assert len(trained) == 2 * (2 * per_layer + projections)  # A and B, two layers


@KINDS
@BOTH_BASES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_plain_autograd_through_all_logits(
    kind: str,
    quantize: str | None,
    checkpointing: bool,
    make_lora: Make,
    make_table: Make,
    naive_loss: Make,
    fast_loss: Make,
) -> None:
    config, table = make_lora(kind, quantize=quantize), make_table(4)
    model = start(config).train()
    fill(model)
    expected = gradients(model, naive_loss(model, table, config))
    if checkpointing:
        model.activation_checkpointing_enable()
    # fast_loss hands the model's own attention back before layers are recomputed
    found = gradients(model, fast_loss(model, table, config, "plain" if checkpointing else "sdpa"))
    assert found.keys() == expected.keys() == trained_weights(model).keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)


@KINDS
def test_the_merged_model_computes_what_was_trained(kind: str, make_lora: Make, take_steps: Make) -> None:
    config = make_lora(kind)
    model = start(config)
    take_steps(model, config)
    trained = logits(model)
    merged = merge_lora(trained_weights(model), config)
    assert (trained - logits(load_base(config))).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-3)


def test_experts_are_merged_where_some_layers_have_none(make_lora: Make) -> None:
    """peft then wraps the fused experts twice, one wrapper in the other."""
    config = make_lora("glm4-moe")
    model = start(config)
    fill(model)
    merged = merge_lora(trained_weights(model), config)
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-3)


def test_dropout_that_experts_cannot_have_is_one_line(make_lora: Make) -> None:
    with pytest.raises(UsageError, match=r"train\.lora: .*dropout"):
        start(make_lora("glm4-moe", dropout=0.1))


def test_quantized_weights_are_no_base(make_config: Make, make_model: Make, tmp_path: Path) -> None:
    quantized = make_model()
    quantized.lm_head.weight.data = quantized.lm_head.weight.data.to(torch.bfloat16)
    with patch.object(adapters, "load_model", return_value=quantized), pytest.raises(OrpoError, match="quantized"):
        load_base(make_config(model=str(tmp_path)))


@KINDS
@BOTH_BASES
def test_merged_weights_by_the_formula(kind: str, quantize: str | None, make_lora: Make, take_steps: Make) -> None:
    """W + (alpha / rank) B A onto the weights in full precision, quantized or not; nothing else changes."""
    config = make_lora(kind, quantize=quantize)
    model = start(config)
    take_steps(model, config)
    adapters = trained_weights(model)
    base = load_file(Path(config.model) / "model.safetensors")
    merged = merge_lora(adapters, config).state_dict()
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        if (down := adapters.get(f"{layer}.lora_A.default.weight")) is not None:
            change = 6 / 4 * adapters[f"{layer}.lora_B.default.weight"] @ down
            assert change.abs().max() > 0
            weight = weight + (change.T if kind == "gpt2" else change)
        torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-6, msg=name)


@KINDS
@BOTH_BASES
def test_the_exported_folder_is_a_plain_model(
    kind: str, quantize: str | None, make_lora: Make, take_steps: Make, tmp_path: Path
) -> None:
    config = make_lora(kind, quantize=quantize)
    model = start(config)
    take_steps(model, config, steps=1)
    merged = merge_lora(trained_weights(model), config)
    merged.save_pretrained(tmp_path)
    base = Path(config.model)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in base.iterdir()}
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    tensors, before = (load_file(folder / "model.safetensors") for folder in (tmp_path, base))
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reopened), logits(merged), rtol=0, atol=0)


def test_dropout_acts_while_training_alone(make_lora: Make) -> None:
    model = start(make_lora(dropout=0.5))
    fill(model)
    one, two = (model.train()(input_ids=IDS).logits for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    ("modules", "adapted"),
    [
        (["q_proj", "v_proj"], {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}),
        (["1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
    ],
)
@BOTH_BASES
def test_named_modules(modules: list[str], adapted: set[str], quantize: str | None, make_lora: Make) -> None:
    model = start(make_lora(modules=modules, quantize=quantize))
    assert {name.split(".lora_")[0] for name in trained_weights(model)} == adapted


@pytest.mark.parametrize(
    ("kind", "modules", "message"),
    [
        ("llama", ["q_proj", "lm_head"], "train.lora.modules: 'lm_head' is the output head, .* leave it out"),
        ("llama-tied", ["lm_head"], "'lm_head' is the output head"),
        ("llama", ["query"], "no linear layer is named 'query'; there are down_proj, gate_proj, .*, v_proj$"),
        ("llama", ["_proj"], "no linear layer is named '_proj'"),
        ("llama-tied", ["embed_tokens"], "no linear layer is named 'embed_tokens'"),
        ("gpt2", ["q_proj"], "no linear layer is named 'q_proj'; there are c_attn, c_fc, c_proj$"),
        ("llama", [], r"train.lora.modules: \[\] names no linear layer of LlamaForCausalLM"),
    ],
)
def test_wrong_modules_are_one_line(kind: str, modules: list[str], message: str, make_lora: Make) -> None:
    with pytest.raises(UsageError, match=message):
        start(make_lora(kind, modules=modules))


@pytest.mark.parametrize(
    ("package", "quantize", "extra"),
    [("peft", None, "lora"), ("peft", "nf4", "qlora"), ("bitsandbytes", "nf4", "qlora")],
)
def test_a_missing_package_names_its_extra(
    package: str, quantize: str | None, extra: str, make_lora: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    told = rf"^train\.lora: needs the package {package}: pip install 'orpo-pipeline\[{extra}\]'$"
    with pytest.raises(UsageError, match=told):
        load_base(make_lora(quantize=quantize))


def test_without_lora_the_base_is_whole(make_config: Make, model_folder: Make) -> None:
    model = load_base(make_config(model=str(model_folder("llama"))))
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in model.parameters())


@needs_bitsandbytes
@KINDS
def test_quantized_layers_hold_four_bits(kind: str, make_lora: Make) -> None:
    config = make_lora(kind, quantize="nf4")
    model, plain = load_base(config), load_base(make_lora(kind))
    before = dict(plain.named_parameters())
    quantized = {name: weight for name, weight in model.named_parameters() if weight.dtype == torch.uint8}
    for name, weight in quantized.items():
        assert weight.numel() == before[name].numel() / 2
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested  # scales are quantized too
    body = {name for name, _ in attach_lora(plain, LoraConfig()).named_parameters() if "base_layer.weight" in name}
    assert quantized.keys() == {name.replace(".base_layer", "") for name in body}


@needs_bitsandbytes
@KINDS
def test_qlora_learns_and_its_export_is_close(kind: str, make_lora: Make, take_steps: Make) -> None:
    """The export differs from the trained model by what rounding to four bits did, not by more."""
    config, plain = make_lora(kind, quantize="nf4"), make_lora(kind)
    model = start(config)
    losses = take_steps(model, config, steps=8)
    assert losses[-1] < losses[0]
    merged = merge_lora(trained_weights(model), config)
    rounding = (logits(load_base(config)) - logits(load_base(plain))).std()
    assert (logits(merged) - logits(model)).std() < 2 * rounding


@needs_bitsandbytes
def test_an_evaluation_between_steps_leaves_gradients_as_they_are(
    make_lora: Make, make_table: Make, fast_loss: Make
) -> None:
    """bitsandbytes repacks weights for inference on CPUs with bf16 instructions, and then has no gradients."""
    config, table = make_lora(quantize="nf4"), make_table(4)
    model = start(config)
    fill(model)
    before = gradients(model, fast_loss(model.train(), table, config))
    logits(model)
    after = gradients(model, fast_loss(model.train(), table, config))
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


@needs_bitsandbytes
def test_quantized_layers_follow_autocast(make_lora: Make) -> None:
    """As a Linear does: bf16 inside, fp32 before and after, bit for bit."""
    layer = load_base(make_lora(quantize="nf4")).model.layers[0].mlp.up_proj
    states = torch.randn(3, 16)
    first = layer(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(states).dtype == torch.bfloat16
    assert first.dtype == torch.float32
    assert torch.equal(layer(states), first)
