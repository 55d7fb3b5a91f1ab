"""Answers of a causal language model to prompts of token ids: in batches, with a cache of keys and values.

Each prompt draws from a stream of random numbers of its own, made of the seed and the prompt, so that what is drawn
for it does not depend on what else ran: neither on the other prompts nor on how many of them share a forward pass.
(CPUs and GPUs draw other numbers from one seed.)
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orpo_data.errors import OrpoError
from orpo_train.attention import own_attention
from orpo_train.batching import by_length
from orpo_train.config import Sampling
from orpo_train.model import evaluating

Prompts = Sequence[Sequence[int]]
BATCH_TOKENS = 2**14


@torch.no_grad()
def generate(
    model: Any, prompts: Prompts, sampling: Sampling, ends: Collection[int], batch_tokens: int = BATCH_TOKENS
) -> list[list[int]]:
    """The answer to each prompt, as token ids without the prompt.

    An answer ends with the first token of `ends`, which is part of it, or without one after `sampling.max_new_tokens`
    or where the model takes no more positions. Batches differ in rounding: an answer is the same in any of them unless
    two tokens come out equal but for it, which is rare in fp32 and not so in bf16.

    Args:
        model: of transformers; runs in its weights' type, or in autocast's where that is entered.
        ends: see `end_tokens`.
        batch_tokens: most tokens in the cache: rows of a batch times the longest prompt and answer.

    Raises OrpoError naming the prompt that is empty or leaves no room for an answer, or when logits are not finite.
    """
    room = [_room(model, number, prompt, sampling) for number, prompt in enumerate(prompts)]
    answers: dict[int, list[int]] = {}
    with evaluating(model), own_attention(model):
        for batch in by_length([len(p) + new for p, new in zip(prompts, room, strict=True)], batch_tokens):
            drawn = _answer(model, [prompts[i] for i in batch], [room[i] for i in batch], sampling, ends)
            answers |= zip(batch, drawn, strict=True)
    return [answers[number] for number in range(len(prompts))]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end an answer: those of the model's generation settings, and the tokenizer's end token."""
    known = model.generation_config.eos_token_id
    ends = known if isinstance(known, list) else [known]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def _room(model: Any, number: int, prompt: Sequence[int], sampling: Sampling) -> int:
    """Most tokens of the answer to a prompt."""
    limit = getattr(model.config, "max_position_embeddings", None)
    room = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - len(prompt))
    if not prompt or room < 1:
        what = f"the model takes {limit}, none is left for an answer" if prompt else "a model answers to one at least"
        raise OrpoError(f"prompt {number} has {len(prompt)} tokens: {what}")
    return room


def _answer(
    model: Any, prompts: Prompts, room: Sequence[int], sampling: Sampling, ends: Collection[int]
) -> list[list[int]]:
    """The answers of one batch. Rows that have ended leave it when they are half of it."""
    answers: list[list[int]] = [[] for _ in prompts]
    ids, mask = _left_padded(prompts, next(model.parameters()).device)  # [B, T]
    streams = [_stream(sampling.seed, prompt, ids.device) for prompt in prompts]
    rows, open_rows = list(range(len(prompts))), set(range(len(prompts)))
    limit = getattr(model.config, "max_position_embeddings", None)
    last = limit and limit - 1
    cache: Any = None
    while open_rows:
        if 2 * len(open_rows) <= len(rows):
            kept = torch.tensor([place for place, row in enumerate(rows) if row in open_rows], device=ids.device)
            rows, ids, mask = sorted(open_rows), ids[kept], mask[kept]
            cache.batch_select_indices(kept)
        positions = (mask.cumsum(1) - 1).clamp(0, last)[:, -ids.shape[1] :]  # rows that have ended may be past it
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise OrpoError(f"generating: {type(model).__name__} keeps no keys and values of what it has read")
        tokens = choose(output.logits[:, -1].float(), [streams[row] for row in rows], sampling)  # [B]
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in open_rows:
                answers[row].append(token)
                if token in ends or len(answers[row]) == room[row]:
                    open_rows.remove(row)
        ids, mask = tokens[:, None], torch.cat([mask, torch.ones_like(tokens)[:, None]], dim=1)
    return answers


def _left_padded(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, T]: prompts end together, so that all answers begin at one column.

    >>> [part.tolist() for part in _left_padded([[5, 6], [7]], torch.device("cpu"))]
    [[[5, 6], [0, 7]], [[1, 1], [0, 1]]]
    """
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _stream(seed: int, prompt: Sequence[int], device: torch.device) -> torch.Generator:
    own_seed = np.random.SeedSequence([seed, len(prompt), *prompt]).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(own_seed))


def choose(logits: Tensor, streams: Sequence[torch.Generator], sampling: Sampling) -> Tensor:
    """The next token of each row, [B], from logits [B, V].

    Each token of probability p comes after a time drawn with the mean 1 / p, and the first one is taken: rounding moves
    the winner of such a race far less often than the edges of 50,000 shares laid end to end.
    """
    if not logits.amax(dim=-1).isfinite().all():
        raise OrpoError("generating: the model's logits are not finite; are its weights?")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    times = torch.stack(
        [torch.empty_like(row).exponential_(generator=s) for row, s in zip(logits, streams, strict=True)]
    )
    return (probabilities / times).argmax(dim=-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """[B, V] with 0 for all but the likeliest tokens that together have `top_p`, and those as likely as the last one.

    >>> nucleus(torch.tensor([[0.25, 0.5, 0.125, 0.125]]), 0.75).tolist()
    [[0.25, 0.5, 0.0, 0.0]]
    """
    ordered = probabilities.sort(dim=-1, descending=True).values
    needed = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered < top_p
    least = ordered.gather(1, needed.sum(dim=-1, keepdim=True) - 1)
    return probabilities.where(probabilities >= least, 0)
