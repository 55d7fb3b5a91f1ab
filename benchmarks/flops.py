"""Work that a training step needs, counted in floating-point operations, and models of known size to do it with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.data import PairLengths

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-1b": {  # the shape of Llama-3.2-1B; the vocabulary is that of the tokenizer
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}


def random_model(name: str, tokenizer: Path, work: Path) -> Path:
    """Folder of a Llama with random weights and the given tokenizer, made once below `work`."""
    folder = work / name
    if folder.exists():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **CONFIGS[name]))
    partial = work / f".{name}.partial"
    model.save_pretrained(partial)
    words.save_pretrained(partial)
    partial.rename(folder)
    return folder


def needed_flops(model: Path, pairs: Iterable[PairLengths]) -> float:
    """Forward and backward of what the loss needs, whatever a trainer does beyond it; the same for both sides.

    A prompt runs once for both answers; causal attention reads what lies before; the head runs where the loss reads:
    on prompt and chosen answer (L_SFT as TRL has it) and on the rejected answer. Recomputation is not counted.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    heads, layers = config.num_attention_heads * config.head_dim, config.num_hidden_layers
    projections = 2 * config.hidden_size * (heads + config.num_key_value_heads * config.head_dim)
    per_token = 2 * layers * (projections + 3 * config.hidden_size * config.intermediate_size)
    per_read = 2 * config.hidden_size * config.vocab_size
    total = 0
    for pair in pairs:
        p, answers = pair.prompt, (pair.chosen, pair.rejected)
        attended = p * (p + 1) / 2 + sum(m * p + m * (m + 1) / 2 for m in answers)
        total += per_token * pair.needed + 4 * layers * heads * attended + per_read * (pair.needed - 1)
    return 3 * total
