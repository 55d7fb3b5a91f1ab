"""A causal language model as something that scores pairs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import pad

from orpo_data.errors import OrpoError
from orpo_data.schema import ANSWERS
from orpo_train.attention import PACKED_ATTENTION, Branches, UnsupportedAttentionError, use_packed_attention
from orpo_train.batching import Limits, PairDataset, grow_trees
from orpo_train.layout import Batch, Collate, collate_packed, collate_plain
from orpo_train.logprobs import HeadShape, token_logprobs
from orpo_train.objectives import log1mexp

log = logging.getLogger(__name__)

PLAIN = "plain"
ROW_MULTIPLE = 128
LAYOUT_TOLERANCE = 1e-3
"""Largest difference of a token's log-probability between two layouts in fp32. Rounding makes some 1e-5."""


def load_model(model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> nn.Module:
    """A causal language model with fp32 weights, from safetensors only.

    Raises OrpoError in one line when it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    loaded, missing = load_pretrained(AutoModelForCausalLM, model, revision, trust_remote_code=trust_remote_code)
    if missing:
        raise OrpoError(f"train.model: {str(model)!r} lacks weights, {missing[0]} and {len(missing) - 1} more")
    return loaded


def load_pretrained(kind: Any, model: str | Path, revision: str | None, **settings: Any) -> tuple[nn.Module, list[str]]:
    """A model by one of transformers' Auto classes, and the names of the weights that its files lack."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    refuse_pickle(Path(model))
    try:
        loaded, report = kind.from_pretrained(
            model, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **settings
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise OrpoError(f"train.model: cannot load {str(model)!r}: {str(error).strip().splitlines()[0]}") from None
    return loaded, sorted(report["missing_keys"])


def refuse_pickle(folder: Path) -> None:
    """OrpoError for a model folder whose weights are a pickle, which may run anything; it says how to convert it."""
    if any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.pkl") for file in folder.glob(kind)):
        load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, use_safetensors=False)"
        raise OrpoError(
            f"train.model: {folder / pickles[0]} is a pickle, which can run code when it is opened; weights are read "
            "from safetensors only. Convert it, tensors alone: python -c "
            f'"from transformers import AutoModelForCausalLM; {load}.save_pretrained({str(folder)!r})"'
        )


class Scorer(nn.Module):
    """Runs a model's body over batches; what is read from its hidden states is for a subclass to say.

    Args:
        model: a model of transformers.
        layout: how batches lie, "flex", "sdpa" or "plain"; see `choose_layout`.
        precision: of the matrix products, "fp32" or "bf16"; weights, their gradients and what is read are fp32.
    """

    reads: ClassVar[str]  # what `read` reads, in words

    def __init__(self, model: nn.Module, layout: str = PLAIN, precision: str = "fp32") -> None:
        super().__init__()
        self.model: Any = model
        self.layout = layout
        # autocast lives in here, not around: wrappers of several processes switch off what is entered outside
        self._bf16 = precision == "bf16"
        # accelerate shards these classes of layers one by one
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        if layout != PLAIN:
            use_packed_attention(model, layout)

    @property
    def collate(self) -> Collate:
        return collate_plain if self.layout == PLAIN else collate_packed

    def forward(self, batch: Batch) -> Tensor:
        """What `read` reads; a method of its own so that wrappers see the whole of a pass."""
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self._bf16):
            return self.read(self._hidden(batch), batch)

    def read(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Values in fp32 from the last hidden states of the flattened rows, [R * T, H]."""
        raise NotImplementedError

    def sums(self, values: Tensor, batch: Batch) -> "PairSums":
        """What the values of `read` say of each pair."""
        raise NotImplementedError

    def _hidden(self, batch: Batch) -> Tensor:
        batch = rounded_up(batch)
        packed = {} if batch.branches is None else {"branches": batch.branches}
        hidden: Tensor = self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            **packed,
        ).last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1])


class SequenceScorer(Scorer):
    """A causal language model that reads log-probabilities; logits are never made whole."""

    reads = "a log-probability"

    def __init__(self, model: nn.Module, layout: str = PLAIN, precision: str = "fp32") -> None:
        shape = HeadShape.of(model.config)
        check_head(model, shape)  # by the model's own attention
        super().__init__(model, layout, precision)
        self._shape = shape

    def read(self, hidden: Tensor, batch: Batch) -> Tensor:
        """log p of each target of the batch, [K]."""
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return token_logprobs(hidden[batch.positions], head.weight, batch.targets, bias, self._shape)

    def sums(self, values: Tensor, batch: Batch) -> "PairSums":
        return pair_sums(values, batch)


def rounded_up(batch: Batch) -> Batch:
    """A packed row whose length is a multiple of ROW_MULTIPLE: what lacks is a prompt at its end that nobody reads.

    Libraries compile and keep their bf16 kernels for each length they meet: without this, memory grows with the steps.
    """
    extra = -batch.input_ids.shape[1] % ROW_MULTIPLE
    if batch.branches is None or not extra:
        return batch
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, batch.input_ids[:, :1].expand(-1, extra)], dim=1),  # 0 may embed nothing
        position_ids=pad(batch.position_ids, (0, extra)),
        branches=Branches((*batch.branches.lengths, (extra, 0))),
    )


@dataclass(frozen=True)
class PairSums:
    """What the log-probabilities of a batch say of its B pairs, each [B] in fp32."""

    chosen: Tensor  # mean log-probability of the response tokens
    rejected: Tensor  # likewise; NaN where the rejected answers were not run
    nll_sum: Tensor  # minus the summed log-probabilities that the supervised loss covers
    nll_tokens: Tensor  # how many they are
    chosen_tokens: Tensor  # tokens of the response
    rejected_tokens: Tensor
    rejected_unlikelihood: Tensor  # mean of -log(1 - p) over the rejected response's tokens


def pair_sums(token_logps: Tensor, batch: Batch) -> PairSums:
    """Figures of each pair from the log-probabilities at a batch's positions."""

    def per_segment(values: Tensor) -> Tensor:
        return torch.zeros(batch.segments, dtype=values.dtype, device=values.device).index_add(0, batch.segment, values)

    sums, counts = per_segment(token_logps), per_segment(torch.ones_like(token_logps))
    missing = torch.full_like(sums[batch.chosen], torch.nan)

    def of_rejected(values: Tensor) -> Tensor:
        return values[batch.rejected] if len(batch.rejected) else missing

    return PairSums(
        chosen=sums[batch.chosen] / counts[batch.chosen],
        rejected=of_rejected(sums / counts),
        nll_sum=-(sums[batch.prompt] + sums[batch.chosen]),
        nll_tokens=counts[batch.prompt] + counts[batch.chosen],
        chosen_tokens=counts[batch.chosen],
        rejected_tokens=of_rejected(counts),
        rejected_unlikelihood=of_rejected(-per_segment(log1mexp(token_logps)) / counts),
    )


def choose_layout(model: Any, data: PairDataset, wanted: str, scorer: type[Scorer] = SequenceScorer) -> str:
    """The fastest layout in which the scorer reads the same of real pairs as in the plain one.

    `wanted` is that of the configuration: "auto" tries FlexAttention (on CUDA), then scaled_dot_product_attention, and
    falls back to plain with a warning; a named layout that disagrees is an OrpoError. The model's weights must be in
    fp32, or differences would hide in their rounding.
    """
    candidates = [wanted] if wanted != "auto" else ["flex", "sdpa"] if _device(model).type == "cuda" else ["sdpa"]
    if wanted == PLAIN:
        return PLAIN
    pairs = sample_pairs(data)
    plain = _probe(scorer, model, PLAIN, data, pairs)
    for layout in candidates:
        why = disagreement(model, layout, data, pairs, plain, scorer)
        if why is None:
            return layout
        if wanted != "auto":
            raise OrpoError(f"train.layout: {layout} does not suit {type(model).__name__}: {why}; use auto or plain")
        log.warning("layout %s does not suit %s: %s", layout, type(model).__name__, why)
    log.warning("training in the plain layout: prompts run twice, rows are padded")
    return PLAIN


def sample_pairs(data: PairDataset, count: int = 3) -> list[int]:
    """Pairs of the shorter half, where layouts part at an answer's first token already; and the longest, or a window
    that the model looks through would not be seen."""
    order = np.argsort(data.lengths["chosen"] + data.lengths["rejected"], kind="stable")
    return sorted({int(order[int(share * (len(order) - 1))]) for share in (*np.linspace(0.05, 0.3, count), 1)})


def disagreement(
    model: Any, layout: str, data: PairDataset, pairs: list[int], plain: Tensor, scorer: type[Scorer] = SequenceScorer
) -> str | None:
    """Why a packed layout cannot be used, None when the scorer reads the same as `plain`, [K]."""
    own = model.config._attn_implementation
    try:
        packed = _probe(scorer, model, layout, data, pairs)
    except torch.OutOfMemoryError:
        raise
    except (UnsupportedAttentionError, TypeError, ValueError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    finally:
        model.set_attn_implementation(own)
    largest = float((packed - plain).abs().max())
    return None if largest <= LAYOUT_TOLERANCE else f"{scorer.reads} differs by {largest:.2g}"


def _probe(kind: type[Scorer], model: Any, layout: str, data: PairDataset, pairs: list[int]) -> Tensor:
    """What is read of some pairs, [K]: both layouts read it in the same order."""
    assert layout == PLAIN or layout in PACKED_ATTENTION
    trees = grow_trees(data, pairs, ANSWERS, Limits(data.longest, pairs=1))
    with evaluating(model), torch.no_grad():
        scorer = kind(model, layout)
        values: Tensor = scorer(scorer.collate(data, trees, "prompt+response").to(_device(model)))
    return values


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards the model is in the mode that it was in, whatever happened."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def best_device() -> torch.device:
    """Where models run that nothing else has given a place."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def check_head(model: Any, shape: HeadShape) -> None:
    """OrpoError unless the body's hidden states times the head's weight are the model's own logits.

    Some architectures do more than scale and cap their logits; an adapter on the head would get no gradient.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise OrpoError(f"{type(model).__name__}: the output head is a {type(head).__name__}, a plain Linear is needed")
    ids = torch.arange(4, device=head.weight.device)[None] % len(head.weight)
    with evaluating(model), torch.no_grad():
        body = model.base_model(input_ids=ids, use_cache=False)
        if model.base_model is model or not hasattr(body, "last_hidden_state"):
            raise OrpoError(f"{type(model).__name__}: has no body of its own, whose hidden states the head would read")
        ours = shape.logits(head(body.last_hidden_state))
        theirs = model(input_ids=ids, use_cache=False).logits
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
        raise OrpoError(
            f"{type(model).__name__}: does something between hidden states and logits that is not supported"
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
    rope = getattr(model.config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and data.longest > original:
        log.warning(
            "%s rotates a whole forward pass by other factors where one sequence has over %d tokens: the loss of short "
            "pairs will depend on what they are batched with; tokenize.max_length %d avoids it",
            *(type(model).__name__, original, original),
        )
