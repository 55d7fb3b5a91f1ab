"""A causal language model as something that scores sequences."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from orpo_data.errors import OrpoError
from orpo_train.batching import Batch, PairDataset
from orpo_train.logprobs import token_logprobs


def load_model(model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> nn.Module:
    """A causal language model with fp32 weights, from safetensors only.

    Raises OrpoError in one line when it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise OrpoError(f"train.model: cannot load {str(model)!r}: {str(error).strip().splitlines()[0]}") from None
    if missing := sorted(report["missing_keys"]):
        raise OrpoError(f"train.model: {str(model)!r} lacks weights, {missing[0]} and {len(missing) - 1} more")
    bare: nn.Module = loaded
    return bare


class SequenceScorer(nn.Module):
    """Runs a model's body and reads log-probabilities at the positions of a batch; logits are never made whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        check_head(model)

    def forward(self, batch: Batch) -> Tensor:
        """log p of each target of the batch, [K] in fp32."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state  # [2B, T, H]
        read = hidden.reshape(-1, hidden.shape[-1])[batch.positions]  # [K, H]
        head = self.model.get_output_embeddings()
        return token_logprobs(read, head.weight, batch.targets, getattr(head, "bias", None))


@dataclass(frozen=True)
class PairLogps:
    """What the objectives need of B pairs, each [B] in fp32."""

    chosen: Tensor  # mean log-probability of the response tokens
    rejected: Tensor
    nll_sum: Tensor  # minus the summed log-probabilities that the supervised loss covers
    nll_tokens: Tensor  # how many they are


def pair_logps(token_logps: Tensor, batch: Batch) -> PairLogps:
    """Per pair figures from the log-probabilities at a batch's positions."""

    def per_sequence(values: Tensor) -> Tensor:
        return torch.zeros(2 * batch.pairs, dtype=values.dtype, device=values.device).index_add(
            0, batch.sequence, values
        )

    inside = batch.in_response.to(token_logps.dtype)
    means = per_sequence(token_logps * inside) / per_sequence(inside)
    chosen, rejected = means.chunk(2)
    nll_sum = -per_sequence(token_logps)[: batch.pairs]
    return PairLogps(chosen, rejected, nll_sum, per_sequence(torch.ones_like(inside))[: batch.pairs])


def check_head(model: Any) -> None:
    """OrpoError unless the body's hidden states times the head's weight are the model's own logits.

    Some architectures scale or cap their logits on the way; an adapter on the head would get no gradient.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise OrpoError(f"{type(model).__name__}: the output head is a {type(head).__name__}, a plain Linear is needed")
    training = model.training
    ids = torch.arange(4, device=head.weight.device)[None] % model.config.vocab_size
    try:
        with torch.no_grad():
            model.eval()
            ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
            theirs = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
        raise OrpoError(
            f"{type(model).__name__}: does something between hidden states and logits that is not supported "
            "(a logit scale or cap)"
        )


def check_fits(model: Any, data: PairDataset) -> None:
    """OrpoError if the data has token ids or lengths that the model does not know."""
    vocabulary = model.get_input_embeddings().num_embeddings
    if data.largest_id >= vocabulary:
        raise OrpoError(
            f"the data has token id {data.largest_id}, the model knows {vocabulary}: "
            "was it tokenized with another model's tokenizer?"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and data.longest > limit:
        raise OrpoError(
            f"the data has sequences of {data.longest} tokens, the model takes {limit}: lower tokenize.max_length"
        )
