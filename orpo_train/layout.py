"""How the trees of a micro-batch lie in memory: packed into one row, or each sequence in a row of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orpo_train.attention import Branches
from orpo_train.batching import PairDataset, Tree

NllScope = Literal["response", "prompt+response"]
Collate = Callable[[PairDataset, Sequence[Tree], NllScope], "Batch"]


@dataclass(frozen=True)
class Batch:
    """Token rows, and the K positions whose log-probabilities the loss reads.

    Prompts and responses are numbered as segments, tree by tree: its prompt, then its responses. A pair's figures are
    sums over the segments of its prompt, its chosen and its rejected answer.
    """

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64
    positions: Tensor  # [K] into the flattened [R * T] rows: where the target is predicted
    targets: Tensor  # [K] token ids
    segment: Tensor  # [K] the segment that the target belongs to
    ends: Tensor  # [segments] into the flattened rows: where a response's last token lies; 0 for a prompt
    prompt: Tensor  # [B] segment of each pair's prompt, which has positions only where the loss covers prompts
    chosen: Tensor  # [B] segment of its chosen answer
    rejected: Tensor  # [B], or [0] when the rejected answers are not needed
    segments: int
    reference: Tensor  # [B, 2] log-probabilities of chosen and rejected under the reference model, NaN without one
    attention_mask: Tensor | None = None  # [R, T] int64, 0 on padding; None when packed
    branches: Branches | None = None  # who may attend to whom when packed

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


class _Reads:
    """Collects the positions that are read, with their targets and segments."""

    def __init__(self) -> None:
        self._positions: list[npt.NDArray[np.int64]] = []
        self._targets: list[npt.NDArray[np.int32]] = []
        self._segments: list[tuple[int, int]] = []
        self._ends: dict[int, int] = {}

    def add(self, segment: int, targets: npt.NDArray[np.int32], before: int, first: int) -> None:
        """A run of targets that lies at `first`; what predicts its first token lies at `before`."""
        self._positions.append(np.concatenate([[before], np.arange(first, first + len(targets) - 1)]))
        self._targets.append(targets)
        self._segments.append((segment, len(targets)))

    def end(self, segment: int, last: int) -> None:
        """The response `segment` ends in the token at `last`."""
        self._ends[segment] = last

    def batch(self, data: PairDataset, trees: Sequence[Tree], input_ids: Tensor, position_ids: Tensor) -> Batch:
        numbers, counts = np.array(self._segments).T
        first = list(accumulate((1 + len(tree.responses) for tree in trees), initial=0))
        pairs = [(start, tree) for start, tree in zip(first, trees, strict=False)]
        return Batch(
            input_ids=input_ids,
            position_ids=position_ids,
            positions=torch.from_numpy(np.concatenate(self._positions)),
            targets=torch.from_numpy(np.concatenate(self._targets).astype(np.int64)),
            segment=torch.from_numpy(np.repeat(numbers, counts)),
            ends=torch.tensor([self._ends.get(segment, 0) for segment in range(first[-1])]),
            prompt=torch.tensor([start for start, tree in pairs for _ in tree.pairs]),
            chosen=torch.tensor([start + 1 + place for start, tree in pairs for place in tree.chosen]),
            rejected=torch.tensor([start + 1 + p for start, tree in pairs for p in tree.rejected], dtype=torch.long),
            segments=first[-1],
            reference=torch.from_numpy(data.reference[[pair for tree in trees for pair in tree.pairs]]),
        )


def collate_packed(data: PairDataset, trees: Sequence[Tree], scope: NllScope = "response") -> Batch:
    """All trees in one row without padding; the positions of each response go on from its prompt.

    One pair with prompt [7, 8], chosen answer [3, 2] and rejected answer [5]:

        input_ids     [[7, 8, 3, 2, 5]]     the prompt's last token predicts the first of both answers:
        position_ids  [[0, 1, 2, 3, 2]]     positions [1, 2, 1]   targets [3, 2, 5]   segment [1, 1, 2]

    With scope "prompt+response" the prompt's own tokens are read too, once for each tree.
    """
    reads = _Reads()
    tokens: list[npt.NDArray[np.int32]] = []
    position_ids: list[npt.NDArray[np.int64]] = []
    branches: list[tuple[int, ...]] = []
    start = segment = 0
    for tree in trees:
        prompt = data.prompt(tree.pairs[0])
        responses = [data.response(pair, side) for pair, side in tree.responses]
        if scope == "prompt+response" and len(prompt) > 1:
            reads.add(segment, prompt[1:], start, start + 1)
        tokens.append(prompt)
        position_ids.append(np.arange(len(prompt)))
        end_of_prompt = end = start + len(prompt)
        for number, response in enumerate(responses, segment + 1):
            reads.add(number, response, end_of_prompt - 1, end)
            tokens.append(response)
            position_ids.append(np.arange(len(prompt), len(prompt) + len(response)))
            end += len(response)
            reads.end(number, end - 1)
        branches.append((len(prompt), *map(len, responses)))
        start, segment = end, segment + 1 + len(responses)
    row = torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None]
    batch = reads.batch(data, trees, row, torch.from_numpy(np.concatenate(position_ids))[None])
    return replace(batch, branches=Branches(tuple(branches)))


def collate_plain(data: PairDataset, trees: Sequence[Tree], scope: NllScope = "response") -> Batch:
    """The layout that every model can take: each sequence whole, in a row of its own, padded at the end.

    One pair with prompt [7, 8], chosen answer [3, 2] and rejected answer [5]:

        input_ids   [[7, 8, 3, 2],      positions 1 and 2 of row 0 predict 3 and 2,
                     [7, 8, 5, 0]]      position 1 of row 1 (5 when flattened) predicts 5

    The mask follows from the lengths, never from token values.
    """
    sequences = [data.ids(pair, side) for tree in trees for pair, side in tree.responses]
    width = max(map(len, sequences))
    input_ids = np.zeros((len(sequences), width), np.int64)
    mask = np.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    reads = _Reads()
    row = segment = 0
    for tree in trees:
        prompt = data.prompt(tree.pairs[0])
        if scope == "prompt+response" and len(prompt) > 1:
            reads.add(segment, prompt[1:], row * width, row * width + 1)
        for number, (pair, side) in enumerate(tree.responses, segment + 1):
            first = row * width + len(prompt)
            response = data.response(pair, side)
            reads.add(number, response, first - 1, first)
            reads.end(number, first + len(response) - 1)
            row += 1
        segment += 1 + len(tree.responses)
    batch = reads.batch(data, trees, torch.from_numpy(input_ids), torch.arange(width).expand(len(sequences), width))
    return replace(batch, attention_mask=torch.from_numpy(mask))
