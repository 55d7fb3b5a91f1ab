"""Attention over packed trees: a prompt's tokens see what lies before them in the prompt, a response's tokens see the
prompt and what lies before them in that response. Nothing sees another tree or another response.

Both functions take the place of a model's own attention by transformers' attention interface; `branches` reaches them
as a keyword argument of the model's forward pass. A layer's sliding window is counted in positions, as it would be if
the response followed the prompt directly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Changes to the attention scores that neither function makes."""


class UnsupportedAttentionError(Exception):
    """A model's layer asks for something that attention over packed rows does not offer."""


class Branches:
    """Who may attend to whom in a packed row.

    `lengths` holds for each tree the tokens of its prompt and of each response: ((2, 2, 1),) is a prompt of two
    tokens with a response of two and a response of one; the first response may be empty. A mask is made once and serves
    all layers.
    """

    def __init__(self, lengths: tuple[tuple[int, ...], ...]) -> None:
        self.lengths = lengths
        self._made: dict[Any, Any] = {}

    def once(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """make(*arguments), remembered."""
        if (make, arguments) not in self._made:
            self._made[make, arguments] = make(*arguments)
        return self._made[make, arguments]


def causal_mask(before: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """[tokens, before + tokens], True where a token may look: `before` earlier ones, itself and those between.

    >>> causal_mask(2, 2, window=None, device=torch.device("cpu")).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    mask = torch.ones(tokens, before + tokens, dtype=torch.bool, device=device).tril(before)
    return mask if window is None else mask.triu(before - window + 1)


@dataclass(frozen=True)
class Scores:
    """How a layer turns queries and keys into attention."""

    scale: float | None
    dropout: float
    window: int | None


def _as_transformers_calls_it(
    attend: Callable[[Tensor, Tensor, Tensor, Branches, Scores], Tensor],
) -> Callable[..., tuple[Tensor, None]]:
    """An attention over trees in the form of transformers' attention interface; the result is [1, T, heads, D]."""

    @wraps(attend)
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        branches: Branches,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **asked: Any,
    ) -> tuple[Tensor, None]:
        for name in UNSUPPORTED:
            if asked.get(name) is not None:
                raise UnsupportedAttentionError(f"the model's attention has a {name}")
        scores = Scores(scaling, dropout, sliding_window)
        return attend(query, key, value, branches, scores).transpose(1, 2).contiguous(), None

    return attention


@_as_transformers_calls_it
def sdpa_trees(query: Tensor, key: Tensor, value: Tensor, branches: Branches, scores: Scores) -> Tensor:
    """scaled_dot_product_attention for each branch alone: no work goes into pairs of tokens that do not meet.

    query is [1, heads, T, D], key and value [1, key heads, T, D]; the result is [1, heads, T, D].
    """
    # the prompt and its first response are one causal sequence; the other responses follow alone
    cuts = [length for prompt, first, *others in branches.lengths for length in (prompt + first, *others)]
    pieces = zip(*(torch.split(states, cuts, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for prompt, first, *others in branches.lengths:
        q, k, v = next(pieces)
        near = scores.window is not None and scores.window < prompt + first
        mask = branches.once(causal_mask, 0, prompt + first, scores.window, q.device) if near else None
        outputs.append(_attend(q, k, v, mask, scores))
        prompt_k, prompt_v = k[:, :, :prompt], v[:, :, :prompt]
        for response in others:
            q, k, v = next(pieces)
            mask = branches.once(causal_mask, prompt, response, scores.window, q.device)
            k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
            outputs.append(_attend(q, k, v, mask, scores))
    return torch.cat(outputs, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Causal where there is no mask."""
    kind = v.dtype
    # the CPU's bf16 kernel keeps megabytes of compiled code for each length it meets
    in_full = kind == torch.bfloat16 and not v.is_cuda
    with torch.autocast(v.device.type, enabled=False) if in_full else nullcontext():
        if in_full:
            q, k, v = q.float(), k.float(), v.float()
        return scaled_dot_product_attention(
            q, k, v, mask, scores.dropout, is_causal=mask is None, scale=scores.scale, enable_gqa=True
        ).to(kind)


@_as_transformers_calls_it
def flex_trees(query: Tensor, key: Tensor, value: Tensor, branches: Branches, scores: Scores) -> Tensor:
    """The same by FlexAttention (arXiv 2412.05496): one kernel for the row, which skips blocks that do not meet."""
    if scores.dropout:
        raise UnsupportedAttentionError("FlexAttention has no dropout")
    mask = branches.once(_block_mask, branches.lengths, scores.window, query.device)
    attend = _compiled_flex_attention() if query.is_cuda else _flex_attention()
    output: Tensor = attend(query, key, value, block_mask=mask, scale=scores.scale, enable_gqa=True)
    return output


def branch_numbers(lengths: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token of a packed row: its tree, its branch (0 for the prompt), and its position; each [T].

    >>> [numbers.tolist() for numbers in branch_numbers(((2, 1), (1, 1, 2)))]
    [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 2, 2], [0, 1, 2, 0, 1, 1, 2]]
    """
    trees = torch.tensor([number for number, tree in enumerate(lengths) for _ in range(sum(tree))])
    branches = torch.tensor([branch for tree in lengths for branch, n in enumerate(tree) for _ in range(n)])
    starts = [0 if branch == 0 else tree[0] for tree in lengths for branch, _ in enumerate(tree)]
    counts = [n for tree in lengths for n in tree]
    first = list(accumulate(counts, initial=0))[:-1]
    shift = torch.tensor(starts) - torch.tensor(first)
    return trees, branches, torch.arange(sum(counts)) + shift.repeat_interleave(torch.tensor(counts))


def _block_mask(lengths: tuple[tuple[int, ...], ...], window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    tree, branch, position = (numbers.to(device) for numbers in branch_numbers(lengths))

    def meets(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (tree[q] == tree[k]) & (k <= q) & ((branch[k] == 0) | (branch[k] == branch[q]))
        return seen if window is None else seen & (position[q] - position[k] < window)

    return create_block_mask(meets, None, None, len(tree), len(tree), device=str(device))


def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(_flex_attention(), dynamic=True)


PACKED_ATTENTION = {"sdpa": ("orpo_branches", sdpa_trees), "flex": ("orpo_blocks", flex_trees)}
"""Each by the name transformers knows it by; it must not hold the name of a backend of transformers' own."""


def use_packed_attention(model: Any, backend: str) -> None:
    """Let all layers of a transformers model attend by sdpa_trees or flex_trees."""
    from transformers import AttentionInterface

    name, function = PACKED_ATTENTION[backend]
    disable: Callable[..., Any] = torch.compiler.disable  # a compiler would make its many branches anew each time
    AttentionInterface.register(name, disable(function))
    model.set_attn_implementation(name)


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """For a while, one of transformers' attentions in place of sdpa_trees or flex_trees, which know no cache."""
    usual = model.config._attn_implementation
    if usual in {name for name, _ in PACKED_ATTENTION.values()}:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
