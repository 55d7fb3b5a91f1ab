"""The memory estimate: counted by hand where that can be done, and against what training really takes."""

import subprocess
import sys

import pytest
import torch

from orpo_data.errors import OrpoError
from orpo_train.batching import PairDataset
from orpo_train.config import TrainConfig
from orpo_train.memory import FP32, estimate_memory, in_pieces, largest_pass, peak_memory


@pytest.fixture(scope="module")
def small(make_model, tmp_path_factory):
    """A folder with the configuration of a model alone: nothing else is read."""
    folder = tmp_path_factory.mktemp("small")
    model = make_model("llama")
    model.config.save_pretrained(folder)
    return folder, model


def estimate(small, make_table, **settings):
    config = TrainConfig.model_validate({"model": str(small[0]), "precision": "fp32", "batch_size": 8} | settings)
    return estimate_memory(config, small[0], PairDataset(make_table(24, seed=1)))


def test_weights_gradients_and_adam_by_hand(small, make_table):
    told = estimate(small, make_table)
    count = sum(p.numel() for p in small[1].parameters())
    assert (told.parameters, told.trained) == (count, count)
    assert (told.weights, told.gradients, told.optimizer) == (4 * count, 4 * count, 8 * count)


def test_what_is_kept_is_what_autograd_keeps(small, make_table):
    """The same forward pass with contents: the bytes of all that was saved for the backward pass.

    Contents may tell that a mask is not needed, which makes a little less.
    """
    folder, model = small
    config = TrainConfig(model=str(folder), precision="fp32", batch_size=8, layout="plain")
    data = PairDataset(make_table(24, seed=1))
    batch, _ = largest_pass(config, data)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    saved = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    assert estimate_memory(config, folder, data).activations == pytest.approx(saved, rel=0.05)


def test_adapters_alone_have_gradients(small, make_table):
    pytest.importorskip("peft")
    whole, adapted = estimate(small, make_table), estimate(small, make_table, lora={"rank": 2})
    assert adapted.trained == adapted.parameters - whole.parameters > 0
    assert adapted.optimizer == 2 * adapted.gradients == 2 * FP32 * adapted.trained
    assert adapted.weights == whole.weights + FP32 * adapted.trained


def test_checkpointing_and_bf16_keep_less(small, make_table):
    full = estimate(small, make_table)
    assert estimate(small, make_table, gradient_checkpointing=True).activations < full.activations
    assert estimate(small, make_table, objective="reward").head == 0


def test_several_processes_share(small, make_table):
    alone = estimate(small, make_table)
    optimizer, everything = (in_pieces(alone, sharding, 4) for sharding in ("optimizer", "all"))
    assert in_pieces(alone, "none", 4) == in_pieces(alone, "all", 1) == alone
    assert (optimizer.weights, optimizer.gradients, optimizer.optimizer) == (
        alone.weights,
        alone.gradients // 4,
        alone.optimizer // 4,
    )
    assert everything.weights == alone.weights // 4 + alone.whole
    assert everything.activations == alone.activations


def test_ppo_is_not_estimated(small, make_table):
    with pytest.raises(OrpoError, match="objective ppo is not estimated"):
        estimate(small, make_table, objective="ppo", ppo={"reward_model": "judge"})


def test_the_largest_pass_is_one_that_runs(small, make_table):
    """One step of a pair: a single pass of its tokens. More pairs than fit: several."""
    data = PairDataset(make_table(24, seed=1))
    one, several = largest_pass(TrainConfig(model="m", batch_size=1, layout="plain"), data)
    longest = max(data.lengths[side].max() for side in data.lengths)
    assert not several
    assert one.input_ids.shape == (2, longest)
    budget = 2 * int(longest) + 2
    many, several = largest_pass(TrainConfig(model="m", batch_size=8, layout="plain", micro_batch_tokens=budget), data)
    assert several
    assert many.input_ids.numel() <= budget


def test_peak_memory_rises_with_what_is_held():
    code = (
        "from orpo_train.memory import peak_memory; import torch; before = peak_memory(); "
        "held = torch.ones(50_000_000); del held; print(peak_memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(200e6, rel=0.1)
    assert peak_memory() > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bf16", "fp32", "checkpointing", "LoRA", "reward"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_estimate_is_right_within_15_percent(kind, case, tmp_path):
    """Random models of some hundred megabytes, three steps each in a process of its own, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    from benchmarks.memory import CASES, LEAST, VOCABULARY, in_a_process

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    if kind == "opt":
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=2048, word_embed_proj_dim=512))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=1536, num_key_value_heads=4))
    model.save_pretrained(tmp_path)
    told = in_a_process({"model": str(tmp_path), **LEAST, **CASES[case]})
    assert told["estimate"] == pytest.approx(told["measured"], rel=0.15)
