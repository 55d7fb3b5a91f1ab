"""From TOKENIZED rows to token rows: which pairs make a batch, and how they lie in memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from orpo_data.errors import OrpoError

IntArray = npt.NDArray[np.int64]
NllScope = Literal["response", "prompt+response"]
SIDES = ("chosen", "rejected")


class TokenColumn:
    """A list<int32> column as numpy views on its record batches: nothing is copied, memory does not grow with rows."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._batches = [(c.offsets.to_numpy(), c.values.to_numpy(zero_copy_only=True)) for c in column.chunks]
        self._first_rows = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        lengths = [np.diff(offsets).astype(np.int64) for offsets, _ in self._batches]
        self.lengths: IntArray = np.concatenate([np.empty(0, np.int64), *lengths])

    def row(self, index: int) -> npt.NDArray[np.int32]:
        batch = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        offsets, tokens = self._batches[batch]
        place = index - self._first_rows[batch]
        ids: npt.NDArray[np.int32] = tokens[offsets[place] : offsets[place + 1]]
        return ids

    @property
    def largest(self) -> int:
        """The largest token id, 0 without tokens."""
        used = (tokens[offsets[0] : offsets[-1]] for offsets, tokens in self._batches)
        return int(max((tokens.max(initial=0) for tokens in used), default=0))


class PairDataset:
    """The pairs of a TOKENIZED table, read from its own memory-mapped buffers.

    Raises OrpoError naming the row if a side has no response token.
    """

    def __init__(self, table: pa.Table) -> None:
        self._ids = table["id"]
        self._prompt_len = table["prompt_len"].to_numpy()
        self._columns = {side: TokenColumn(table[f"{side}_input_ids"]) for side in SIDES}
        self.lengths = {side: column.lengths for side, column in self._columns.items()}
        self._refuse_empty_responses()

    def __len__(self) -> int:
        return len(self._prompt_len)

    @property
    def tokens(self) -> int:
        """Tokens of both sides of every pair."""
        return int(sum(lengths.sum() for lengths in self.lengths.values()))

    @property
    def largest_id(self) -> int:
        return max(column.largest for column in self._columns.values())

    @property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        return int(max(lengths.max(initial=0) for lengths in self.lengths.values()))

    def ids(self, pair: int, side: str) -> npt.NDArray[np.int32]:
        return self._columns[side].row(pair)

    def prompt_len(self, pair: int) -> int:
        return int(self._prompt_len[pair])

    def nll_tokens(self, pairs: IntArray, scope: NllScope) -> int:
        """Tokens of the chosen sides that the supervised loss covers: a sequence's first token is never predicted."""
        skipped = self._prompt_len[pairs] if scope == "response" else np.ones(len(pairs), np.int64)
        return int((self.lengths["chosen"][pairs] - skipped).sum())

    def _refuse_empty_responses(self) -> None:
        for side in SIDES:
            empty = np.flatnonzero((self.lengths[side] <= self._prompt_len) | (self._prompt_len < 1))
            if len(empty):
                row = int(empty[0])
                raise OrpoError(f"row {row} (id {self._ids[row].as_py()}): {side} has no response token after a prompt")


def batches_per_epoch(pairs: int, batch_size: int) -> int:
    return math.ceil(pairs / batch_size)


def global_batch(pairs: int, batch_size: int, seed: int, step: int) -> IntArray:
    """Indices of the pairs of optimizer step `step` (from 0): a fresh shuffle each epoch, the last batch may be short.

    It depends on nothing else: not on the number of processes, and not on what ran before.
    """
    epoch, position = divmod(step, batches_per_epoch(pairs, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(pairs)
    return order[position * batch_size : (position + 1) * batch_size]


@dataclass(frozen=True)
class MicroBatch:
    """Pairs of one forward pass; a weight of 0 marks pairs that stand in so that every process does as many passes."""

    pairs: IntArray
    weight: float


def micro_batches(batch: IntArray, lengths: IntArray, size: int, rank: int = 0, world: int = 1) -> list[MicroBatch]:
    """This process' share of a global batch, pairs of like length together.

    >>> [m.pairs.tolist() for m in micro_batches(np.array([4, 0, 2]), np.array([9, 0, 3, 0, 5]), size=2)]
    [[2, 4], [0]]
    """
    passes = math.ceil(math.ceil(len(batch) / world) / size)
    mine = batch[rank::world]
    mine = mine[np.argsort(lengths[mine], kind="stable")]
    cuts = [MicroBatch(mine[start : start + size], 1.0) for start in range(0, len(mine), size)]
    return cuts + [MicroBatch(batch[:1], 0.0)] * (passes - len(cuts))


@dataclass(frozen=True)
class Batch:
    """Token rows of B pairs, chosen rows first, and the K positions whose log-probabilities the loss reads."""

    input_ids: Tensor  # [2B, T] int64, padded at the end
    attention_mask: Tensor  # [2B, T] int64
    positions: Tensor  # [K] into the flattened [2B * T] rows: where the target is predicted
    targets: Tensor  # [K] token ids
    sequence: Tensor  # [K] row of the position, 0..2B-1
    in_response: Tensor  # [K] bool: the target is part of the response (else of the prompt)

    @property
    def pairs(self) -> int:
        return len(self.input_ids) // 2

    def to(self, device: torch.device) -> Self:
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def collate(data: PairDataset, pairs: Sequence[int] | IntArray, scope: NllScope = "response") -> Batch:
    """The plain layout: every sequence in a row of its own.

    One pair with prompt [7, 8], chosen answer [3, 2] and rejected answer [5]:

        input_ids   [[7, 8, 3, 2],      positions 1 and 2 of row 0 predict 3 and 2,
                     [7, 8, 5, 0]]      position 1 of row 1 (5 when flattened) predicts 5
        positions   [1, 2, 5]   targets [3, 2, 5]   sequence [0, 0, 1]

    The mask follows from prompt_len, never from token values. With scope "prompt+response" the prompt's positions of
    the chosen rows are read too.
    """
    rows = [(pair, side) for side in SIDES for pair in pairs]
    sequences = [data.ids(int(pair), side) for pair, side in rows]
    width = max(len(ids) for ids in sequences)
    input_ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    positions, sequence, in_response = [], [], []
    for row, ((pair, side), ids) in enumerate(zip(rows, sequences, strict=True)):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        prompt_len = data.prompt_len(int(pair))
        first = 1 if scope == "prompt+response" and side == "chosen" else prompt_len
        predicted = np.arange(first, len(ids))  # index of the target within its row
        positions.append(row * width + predicted - 1)
        sequence.append(np.full(len(predicted), row))
        in_response.append(predicted >= prompt_len)
    flat = np.concatenate(positions)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        positions=torch.from_numpy(flat),
        targets=torch.from_numpy(input_ids.reshape(-1)[flat + 1]),
        sequence=torch.from_numpy(np.concatenate(sequence)),
        in_response=torch.from_numpy(np.concatenate(in_response)),
    )
