"""Tiny random models, random pairs, and the naive way to compute everything: all logits, plain autograd."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from orpo_data.schema import ANSWERS, REFERENCED, TOKENIZED
from orpo_train.batching import Limits, PairDataset, cut, grow_trees, tree_of
from orpo_train.config import TrainConfig
from orpo_train.model import PLAIN, SequenceScorer, pair_sums
from orpo_train.objectives import OBJECTIVES
from orpo_train.step import NllMean, pair_logps

VOCABULARY = 600  # as many as the test tokenizers have at most


def _llama_like(kind: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **settings,
    )


def _opt(dropout: float, **settings: Any) -> PreTrainedConfig:
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        dropout=dropout,
        attention_dropout=dropout,
        **settings,
    )


def _gpt2(dropout: float) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: _llama_like(LlamaConfig, tie_word_embeddings=False),
    "llama-tied": lambda: _llama_like(LlamaConfig, tie_word_embeddings=True),
    "gpt2": lambda: _gpt2(0.0),
    "gpt2-dropout": lambda: _gpt2(0.1),
    "opt": lambda: _opt(0.0),
    "opt-dropout": lambda: _opt(0.1),
    "opt-projected": lambda: _opt(0.0, word_embed_proj_dim=8, do_layer_norm_before=False),  # as opt-350m
    "mistral": lambda: _llama_like(MistralConfig, sliding_window=None),
    "mistral-window": lambda: _llama_like(MistralConfig, sliding_window=4),
    "qwen2": lambda: _llama_like(Qwen2Config),
    "qwen3": lambda: _llama_like(Qwen3Config),
    "phi": lambda: PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    ),
    "phi3": lambda: _llama_like(Phi3Config),
    "gemma3-window": lambda: _llama_like(Gemma3TextConfig, sliding_window=4),
    "gemma2-capped": lambda: _llama_like(Gemma2Config, final_logit_softcapping=1.0, attn_logit_softcapping=None),
    "gemma2-attention-capped": lambda: _llama_like(Gemma2Config, attn_logit_softcapping=5.0),
    "granite-scaled": lambda: _llama_like(GraniteConfig, logits_scaling=8.0),
    "cohere-scaled": lambda: _llama_like(CohereConfig, logit_scale=0.25),
    "qwen2-moe-window": lambda: _llama_like(
        Qwen2MoeConfig,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
    "glm4-moe": lambda: _llama_like(  # the first layer has no experts; a router has biases that are buffers
        Glm4MoeConfig, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
}


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time() -> Iterator[None]:
    """accelerate keeps its state in class attributes: precision and device of an earlier test must not leak."""
    torch.set_num_threads(1)  # more only get in each other's way at this size
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """A random model of a kind in CONFIGS; weights ten times as large as usual, so that probabilities differ."""

    def make(kind: str = "llama", seed: int = 0, scale: float = 10.0, *, scalar_head: bool = False) -> Any:
        torch.manual_seed(seed)
        config = CONFIGS[kind]()
        if scalar_head:
            config.num_labels = 1
        auto = AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(scale)
        return model

    return make


@pytest.fixture(scope="session")
def model_folder(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same models as local folders."""
    folders: dict[tuple[str, float], Path] = {}

    def make(kind: str = "llama", scale: float = 1.0) -> Path:
        if (kind, scale) not in folders:
            folders[kind, scale] = tmp_path_factory.mktemp(kind)
            make_model(kind, scale=scale).save_pretrained(folders[kind, scale])
        return folders[kind, scale]

    return make


def _table(rows: list[tuple[list[int], list[int], list[int]]]) -> pa.Table:
    records = [
        {
            "id": f"pair-{i}",
            "chosen_input_ids": prompt + chosen,
            "rejected_input_ids": prompt + rejected,
            "prompt_len": len(prompt),
            "source": "test",
            "prompt_turns_dropped": 0,
            "chosen_truncated": False,
            "rejected_truncated": False,
        }
        for i, (prompt, chosen, rejected) in enumerate(rows)
    ]
    return pa.Table.from_pylist(records, schema=TOKENIZED)


@pytest.fixture(scope="session")
def make_table() -> Callable[..., pa.Table]:
    """A TOKENIZED table of (prompt, chosen response, rejected response); of a number, that many random pairs."""

    def make(rows: int | list[tuple[list[int], list[int], list[int]]], seed: int = 0, longest: int = 12) -> pa.Table:
        if isinstance(rows, int):
            random = np.random.default_rng(seed)
            rows = [
                tuple(random.integers(0, VOCABULARY, random.integers(1, longest + 1)).tolist() for _ in range(3))
                for _ in range(rows)
            ]  # type: ignore[misc]
        return _table(rows)

    return make


@pytest.fixture(scope="session")
def make_config() -> Callable[..., TrainConfig]:
    def make(**settings: Any) -> TrainConfig:
        usual = {"model": "tiny", "precision": "fp32", "batch_size": 4, "learning_rate": 1e-2}
        return TrainConfig(**usual | settings)

    return make


@pytest.fixture(scope="session")
def with_reference() -> Callable[..., pa.Table]:
    """A TOKENIZED table with random log-probabilities of a reference model, and each prompt's neighbour's answer."""

    def extend(table: pa.Table, seed: int = 0) -> pa.Table:
        rows, random = table.to_pylist(), np.random.default_rng(seed)

        def logp(ids: list[int], prompt: int) -> float:
            return float(-6.4 * (len(ids) - prompt) + random.normal(scale=3))

        for row, other in zip(rows, [*rows[1:], *rows[:1]], strict=True):
            prompt = row["prompt_len"]
            row["kl_input_ids"] = row["chosen_input_ids"][:prompt] + other["chosen_input_ids"][other["prompt_len"] :]
            row["ref_chosen_logps"] = logp(row["chosen_input_ids"], prompt)
            row["ref_rejected_logps"] = logp(row["rejected_input_ids"], prompt)
            row["ref_kl_logps"] = logp(row["kl_input_ids"], prompt)
        return pa.Table.from_pylist(rows, schema=REFERENCED)

    return extend


def _token_logps(model: Any, ids: list[int]) -> torch.Tensor:
    """Of every token but the first, in float64."""
    row = torch.tensor([ids])
    logps = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, row[0, 1:, None])[:, 0]


def _naive_pairs(model: Any, table: pa.Table, config: TrainConfig) -> torch.Tensor:
    """The preference term of each pair as its equation has it, [pairs]."""
    rows, beta = table.to_pylist(), config.beta
    if config.objective == "reward":
        return torch.stack(
            [-torch.log(torch.sigmoid(_score(model, row, "chosen") - _score(model, row, "rejected"))) for row in rows]
        )
    if config.objective == "kto":
        moved = [
            _token_logps(model, row["kl_input_ids"])[row["prompt_len"] - 1 :].sum() - row["ref_kl_logps"]
            for row in rows
        ]
        kl = max(torch.stack(moved).mean().detach(), torch.tensor(0.0))
    losses = []
    for row in rows:
        better, worse = (_token_logps(model, row[f"{side}_input_ids"])[row["prompt_len"] - 1 :] for side in ANSWERS)
        odds = [side.mean().exp() / (1 - side.mean().exp()) for side in (better, worse)]
        if config.needs_reference:
            gain, fall = better.sum() - row["ref_chosen_logps"], worse.sum() - row["ref_rejected_logps"]
        match config.objective:
            case "sft":
                loss = torch.tensor(0.0)
            case "orpo":
                loss = -torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
            case "probability-ratio":
                loss = -torch.log(torch.sigmoid(torch.log(better.mean().exp() / worse.mean().exp())))
            case "unlikelihood":
                loss = -torch.log(1 - worse.exp()).mean()
            case "dpo":
                loss = -torch.log(torch.sigmoid(beta * (gain - fall)))
            case "ipo":
                loss = (gain / len(better) - fall / len(worse) - 1 / (2 * beta)) ** 2
            case "kto":
                loss = 1 - (torch.sigmoid(beta * (gain - kl)) + torch.sigmoid(beta * (kl - fall))) / 2
        losses.append(loss)
    return torch.stack(losses)


def _score(model: Any, row: dict[str, Any], side: str) -> torch.Tensor:
    """Of the last token, whichever it is: the model's own `forward` passes over those that look like padding."""
    hidden = model.base_model(input_ids=torch.tensor([row[f"{side}_input_ids"]])).last_hidden_state
    score: torch.Tensor = model.score(hidden[0, -1])[0].double()
    return score


def _naive_nll(model: Any, table: pa.Table, config: TrainConfig) -> torch.Tensor:
    covered = []
    for row in table.to_pylist():
        first = 0 if config.nll_scope == "prompt+response" else row["prompt_len"] - 1
        covered.append(-_token_logps(model, row["chosen_input_ids"])[first:])
    if config.nll_reduction == "token":
        return torch.cat(covered).mean()
    return torch.stack([losses.mean() for losses in covered]).mean()


@pytest.fixture(scope="session")
def naive_loss() -> Callable[..., torch.Tensor]:
    """The loss of a whole table with full logits, one sequence at a time: what the fast path must equal."""

    def loss(model: Any, table: pa.Table, config: TrainConfig) -> torch.Tensor:
        preference = _naive_pairs(model, table, config).mean()
        if config.needs_reference or config.objective == "reward":
            return preference
        return _naive_nll(model, table, config) + config.lambda_ * preference

    return loss


@pytest.fixture(scope="session")
def fast_loss() -> Callable[..., torch.Tensor]:
    """The loss of a whole table as one micro-batch, on the path that training takes."""

    def loss(model: Any, table: pa.Table, config: TrainConfig, layout: str = "sdpa") -> torch.Tensor:
        data = PairDataset(table)
        pairs = np.arange(len(data))
        own = model.config._attn_implementation
        scorer = SequenceScorer(model, layout)
        trees = grow_trees(data, pairs, ANSWERS, Limits(10**9))
        if layout == PLAIN:
            trees = [
                tree
                for micro in cut(data, [tree_of(data, [int(p)], ANSWERS) for p in pairs], Limits(10**9))
                for tree in micro.trees
            ]
        batch = scorer.collate(data, trees, config.nll_scope)
        sums = pair_sums(scorer(batch), batch)
        model.set_attn_implementation(own)
        nll = NllMean(config.nll_reduction, data.nll_tokens(pairs, config.nll_scope), len(data))
        logps = pair_logps(sums, batch, nll, kl=torch.tensor(torch.nan))
        return OBJECTIVES[config.objective].loss(logps, config.lambda_).mean()

    return loss
