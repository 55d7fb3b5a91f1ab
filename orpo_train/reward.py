"""Reward models: a language model's body with one score for a sequence, read at its last token.

A trained one is an ordinary folder of transformers: AutoModelForSequenceClassification with num_labels=1 opens it.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from orpo_data.errors import OrpoError
from orpo_train.batching import by_length
from orpo_train.layout import Batch
from orpo_train.model import PairSums, Scorer, evaluating, load_pretrained

log = logging.getLogger(__name__)

TOKENS_PER_PASS = 8192
HEAD = "score.weight"


def load_reward_model(
    model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False, new_head: bool = False
) -> nn.Module:
    """A model with one score for a sequence, in fp32, from safetensors only.

    With `new_head` a model without a scalar head gets a random one, drawn from torch's generator; otherwise one that
    lacks it is an OrpoError.
    """
    from transformers import AutoModelForSequenceClassification

    kind, settings = AutoModelForSequenceClassification, {"num_labels": 1, "trust_remote_code": trust_remote_code}
    reports = logging.getLogger("transformers")
    level = reports.level
    reports.setLevel(logging.ERROR)  # it tells at length of heads that come and go; what is missing is looked at here
    try:
        loaded, missing = load_pretrained(kind, model, revision, **settings)
    finally:
        reports.setLevel(level)
    lacking = [name for name in missing if not (new_head and name == HEAD)]
    if lacking:
        raise OrpoError(f"{str(model)!r} is no reward model: it lacks {lacking[0]}; train one with objective reward")
    score = getattr(loaded, "score", None)
    if type(score) is not nn.Linear or score.out_features != 1:
        raise OrpoError(f"{str(model)!r}: {type(loaded).__name__} has no scalar head named `score`")
    return loaded


def is_reward_model(folder: Path) -> bool:
    """Whether a model folder says of itself that it holds a model with a head for whole sequences."""
    try:
        architectures = json.loads((folder / "config.json").read_text("utf-8")).get("architectures") or []
    except (OSError, ValueError):
        raise OrpoError(f"{folder}: no model folder (its config.json cannot be read)") from None
    return any(name.endswith("ForSequenceClassification") for name in architectures)


class RewardScorer(Scorer):
    """Reads one score for each response, at its last token."""

    reads = "a score"

    def read(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[segments]; what stands at a prompt's place means nothing."""
        return head_scores(self.model, hidden[batch.ends])

    def sums(self, values: Tensor, batch: Batch) -> PairSums:
        """Scores where a language model has mean log-probabilities; there is no supervised loss."""
        chosen, rejected = values[batch.chosen], values[batch.rejected]
        zero, one = torch.zeros_like(chosen), torch.ones_like(chosen)
        return PairSums(chosen, rejected, zero, one, one, one, zero)


def head_scores(model: Any, hidden: Tensor) -> Tensor:
    """The head's scores [N] in fp32, whatever the precision of the body, from hidden states [N, H]."""
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = model.score(hidden.to(model.score.weight.dtype)).squeeze(-1)
    return scores


def score(model: Any, sequences: Sequence[Sequence[int]], tokens_per_pass: int = TOKENS_PER_PASS) -> Tensor:
    """The reward of whole sequences of token ids (prompt and response), [len(sequences)] in fp32 on the CPU.

    `model` is what `load_reward_model` or AutoModelForSequenceClassification loaded. Sequences of like lengths run
    together, padded at the end; their order and what else runs beside them change a score by rounding only.
    Raises OrpoError if a score is not a number.
    """
    device = next(model.parameters()).device
    lengths = [len(ids) for ids in sequences]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max(lengths, default=0) > limit:
        raise OrpoError(f"a sequence has {max(lengths)} tokens, the reward model takes {limit}")
    scores = torch.empty(len(sequences))
    with evaluating(model), torch.no_grad():
        for places in by_length(lengths, tokens_per_pass):
            ids = nn.utils.rnn.pad_sequence([torch.tensor(list(sequences[i])) for i in places], batch_first=True)
            ends = torch.tensor([lengths[i] for i in places])
            mask = (torch.arange(ids.shape[1]) < ends[:, None]).long()
            body = model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            last = body.last_hidden_state[torch.arange(len(places)), ends - 1]
            scores[places] = head_scores(model, last).cpu()
    if len(bad := torch.nonzero(~scores.isfinite())):
        raise OrpoError(
            f"the reward model gives sequence {int(bad[0])} the score {float(scores[bad[0]])}, not a number"
        )
    return scores


@dataclass(frozen=True)
class Judge:
    """A reward model for the token ids of another model."""

    model: Any
    theirs: Any | None = None  # tokenizer of the ids, where it is not the reward model's
    own: Any | None = None

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Any, device: torch.device | str = "cpu") -> Self:
        """The reward model in `folder`; ids of another vocabulary than its own are decoded and tokenized again."""
        from orpo_train.evaluate import load_tokenizer

        model = load_reward_model(folder).to(device).eval()
        own = load_tokenizer(Path(folder))
        if own.get_vocab() == tokenizer.get_vocab():
            return cls(model)
        log.warning("%s has another tokenizer: what it judges is decoded and tokenized again", folder)
        return cls(model, tokenizer, own)

    def __call__(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """`score` of each sequence."""
        if self.theirs is not None and self.own is not None:
            texts = [self.theirs.decode(ids, skip_special_tokens=False) for ids in sequences]
            sequences = [self.own(text, add_special_tokens=False)["input_ids"] for text in texts]
        return score(self.model, sequences)
