"""How different a model's answers are: to one prompt, and from prompt to prompt.

Both are measured as in arXiv 2310.06452: within prompts over several answers to the same prompt, across prompts over
one answer to each.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence

from orpo_data.errors import OrpoError
from orpo_train.evaluate import load_tokenizer
from orpo_train.model import best_device

Draws = Sequence[Sequence[str]]
"""Answers as [draws][prompts]."""

Vectors = npt.NDArray[np.float32]
MOST_TOKENS = 512
ROWS = 16


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams of words over all n-grams of `texts` (distinct-n, arXiv 1510.03055); None if there are none.

    >>> distinct(["a b a b"], 1), distinct(["a b a b"], 2), distinct(["a"], 2)
    (0.5, 0.6666666666666666, None)
    """
    words = (text.lower().split() for text in texts)
    grams = [gram for text in words for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else None


def lexical(draws: Draws, n: int) -> dict[str, float | None]:
    """distinct-n `within` prompts, mean over them, and `across` prompts, mean over the draws.

    It falls with the number and the length of answers: compare it between models, not between lengths.
    """
    within = [distinct(answers, n) for answers in zip(*draws, strict=True)] if len(draws) > 1 else []
    return {"within": _mean(within), "across": _mean([distinct(answers, n) for answers in draws])}


def semantic(draws: Draws, folder: Path) -> dict[str, float | None]:
    """Mean cosine similarity of the answers' embeddings `within` and `across` prompts: less is more diverse."""
    flat = embed(list(chain.from_iterable(draws)), folder)
    vectors = flat.reshape(len(draws), -1, flat.shape[-1])  # [draws, prompts, D]
    within = [_similarity(vectors[:, prompt]) for prompt in range(vectors.shape[1])]
    return {"within": _mean(within), "across": _mean([_similarity(draw) for draw in vectors])}


def embed(texts: Sequence[str], folder: Path) -> Vectors:
    """A vector of length 1 for each text, [texts, D]: the mean of the last hidden states of the model in `folder`.

    Of a long text the first 512 tokens count. OrpoError if the folder holds no model with a tokenizer.
    """
    from transformers import AutoModel

    device = best_device()
    tokenizer = load_tokenizer(folder)
    try:
        model: Any = AutoModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise OrpoError(f"{folder}: no model for embeddings: {str(error).strip().splitlines()[0]}") from None
    ids = [torch.tensor(tokenizer(text or " ")["input_ids"][:MOST_TOKENS] or [0]) for text in texts]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    vectors = np.empty((len(ids), 0), np.float32)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        batch = pad_sequence([ids[row] for row in rows], batch_first=True).to(device)
        mask = pad_sequence([torch.ones_like(ids[row]) for row in rows], batch_first=True).to(device)
        with torch.no_grad():
            hidden = model(input_ids=batch, attention_mask=mask).last_hidden_state  # [rows, T, D]
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if not vectors.shape[1]:
            vectors = np.empty((len(ids), means.shape[1]), np.float32)
        vectors[rows] = torch.nn.functional.normalize(means.float(), dim=1).cpu().numpy()
    return vectors


def _similarity(vectors: Vectors) -> float | None:
    """Mean cosine similarity of all pairs of unit vectors [N, D]: that of their sum, without each with itself."""
    count = len(vectors)
    if count < 2:
        return None
    together = vectors.astype(np.float64)
    return float(((together.sum(0) ** 2).sum() - (together**2).sum()) / (count * (count - 1)))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
