"""From TOKENIZED rows to forward passes: which pairs make a global batch, and which of them run together.

Rows become the pairs of a global batch, these become trees (a prompt and the answers to it), and trees fill
micro-batches within a token budget.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orpo_data.errors import OrpoError
from orpo_data.schema import ANSWERS

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
KL_COLUMNS = ("kl_input_ids", "ref_kl_logps")


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
        self.prompt_lengths: IntArray = table["prompt_len"].to_numpy().astype(np.int64)
        self._columns = {side: TokenColumn(table[f"{side}_input_ids"]) for side in ANSWERS}
        self.lengths = {side: column.lengths for side, column in self._columns.items()}
        self._refuse_empty_responses()
        self._table = table

    @cached_property
    def reference(self) -> FloatArray:
        """[pairs, 2] log-probabilities of chosen and rejected answers under the reference model, NaN where unknown."""
        if not self.has(REFERENCE_COLUMNS):
            return np.full((len(self), 2), np.nan, np.float32)
        return np.stack([self._table[name].to_numpy() for name in REFERENCE_COLUMNS], axis=1).astype(np.float32)

    @cached_property
    def kl(self) -> "PairDataset":
        """The answers that the KL to the reference is estimated from, each in the place of a chosen one."""
        ids, logps = (self._table[name] for name in KL_COLUMNS)
        columns = {"chosen_input_ids": ids, "rejected_input_ids": ids}
        columns |= dict.fromkeys(REFERENCE_COLUMNS, logps)
        return PairDataset(pa.table({"id": self._ids, "prompt_len": self._table["prompt_len"], **columns}))

    def has(self, columns: Sequence[str]) -> bool:
        """Whether the table has these columns, and a value in each row of them."""
        return all(name in self._table.column_names and not self._table[name].null_count for name in columns)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

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
        return int(self.prompt_lengths[pair])

    def prompt(self, pair: int) -> npt.NDArray[np.int32]:
        return self.ids(pair, "chosen")[: self.prompt_len(pair)]

    def response(self, pair: int, side: str) -> npt.NDArray[np.int32]:
        return self.ids(pair, side)[self.prompt_len(pair) :]

    def row_ids(self, pairs: Iterable[int]) -> list[str]:
        """The `id` column of some pairs."""
        return [self._ids[int(pair)].as_py() for pair in pairs]

    @cached_property
    def prompt_number(self) -> IntArray:
        """[pairs], counts the prompts: pairs that lie next to each other and have the same prompt share a number."""
        differs = np.diff(self.prompt_lengths, prepend=-1) != 0
        for pair in np.flatnonzero(~differs).tolist():
            differs[pair] = not np.array_equal(self.prompt(pair), self.prompt(pair - 1))
        return np.cumsum(differs) - 1

    def nll_tokens(self, pairs: IntArray, scope: str) -> int:
        """Tokens of the chosen sides that the supervised loss covers: a sequence's first token is never predicted."""
        skipped = self.prompt_lengths[pairs] if scope == "response" else np.ones(len(pairs), np.int64)
        return int((self.lengths["chosen"][pairs] - skipped).sum())

    def _refuse_empty_responses(self) -> None:
        for side in ANSWERS:
            empty = np.flatnonzero((self.lengths[side] <= self.prompt_lengths) | (self.prompt_lengths < 1))
            if len(empty):
                row = int(empty[0])
                raise OrpoError(f"row {row} (id {self._ids[row].as_py()}): {side} has no response token after a prompt")


def batches_per_epoch(pairs: int, batch_size: int) -> int:
    return math.ceil(pairs / batch_size)


class BatchOrder:
    """Which pairs make up each optimizer step: a fresh shuffle each epoch, its last batch may be short.

    Prompts are shuffled, and the pairs of one prompt stay together: they are no independent examples, and each must
    not be an update of its own (Ouyang et al. 2022, section 3.5). A step's pairs depend on the data, the batch size
    and the seed alone: not on the number of processes, and not on what ran before.
    """

    def __init__(self, data: PairDataset, batch_size: int, seed: int) -> None:
        self._number, self._batch_size, self._seed = data.prompt_number, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> IntArray:
        """Indices of the pairs of optimizer step `step`, from 0."""
        epoch, position = divmod(step, batches_per_epoch(len(self._number), self._batch_size))
        if epoch != self._epoch:
            prompts = int(self._number[-1]) + 1
            rank_of_prompt = np.empty(prompts, np.int64)
            rank_of_prompt[np.random.default_rng([self._seed, epoch]).permutation(prompts)] = np.arange(prompts)
            self._epoch, self._order = epoch, np.argsort(rank_of_prompt[self._number], kind="stable")
        return self._order[position * self._batch_size : (position + 1) * self._batch_size]


@dataclass(frozen=True)
class Tree:
    """A prompt, and the distinct responses to it that some pairs compare: each runs through the model once."""

    pairs: tuple[int, ...]
    responses: tuple[tuple[int, str], ...]  # where each lies in the data: (pair, side)
    chosen: tuple[int, ...]  # of each pair, the place of its chosen answer among the responses
    rejected: tuple[int, ...]  # likewise; empty when the rejected answers are not needed
    tokens: int


def tree_of(data: PairDataset, pairs: Sequence[int], sides: Sequence[str]) -> Tree:
    """The tree of pairs with one prompt. A response that stands in several pairs is in it once.

    Pairs A > B and A > C give responses A, B, C, chosen (0, 0) and rejected (1, 2).
    """
    places: dict[bytes, int] = {}
    responses: list[tuple[int, str]] = []
    found: dict[str, list[int]] = {side: [] for side in ANSWERS}
    for pair in pairs:
        for side in sides:
            text = data.response(pair, side).tobytes()
            if text not in places:
                places[text] = len(responses)
                responses.append((pair, side))
            found[side].append(places[text])
    tokens = data.prompt_len(pairs[0]) + sum(len(text) // 4 for text in places)
    return Tree(tuple(pairs), tuple(responses), tuple(found["chosen"]), tuple(found["rejected"]), tokens)


@dataclass(frozen=True)
class Limits:
    """What a forward pass may hold."""

    tokens: int
    pairs: int | None = None

    def hold(self, tokens: int, pairs: int) -> bool:
        return tokens <= self.tokens and (self.pairs is None or pairs <= self.pairs)


def grow_trees(data: PairDataset, batch: Iterable[int], sides: Sequence[str], limits: Limits) -> list[Tree]:
    """The trees of a batch: neighbours in it with one prompt share a tree as far as the limits allow."""
    trees: list[Tree] = []
    for pair in map(int, batch):
        if trees and data.prompt_number[trees[-1].pairs[-1]] == data.prompt_number[pair]:
            larger = tree_of(data, [*trees[-1].pairs, pair], sides)
            if limits.hold(larger.tokens, len(larger.pairs)):
                trees[-1] = larger
                continue
        trees.append(tree_of(data, [pair], sides))
    return trees


@dataclass(frozen=True)
class MicroBatch:
    """Trees of one forward pass; a weight of 0 marks one that stands in so that every process does as many passes."""

    trees: tuple[Tree, ...]
    weight: float = 1.0


def pack(trees: Sequence[Tree], limits: Limits, multiple: int = 1) -> list[MicroBatch]:
    """Trees to as few micro-batches as the limits allow, filled evenly, their number a multiple of `multiple`.

    The largest tree goes first, each into the emptiest micro-batch (Graham's longest-processing-time rule); when one
    would overflow, there is one more. Raises ValueError if a tree alone is over the limits.
    """
    if not all(limits.hold(tree.tokens, len(tree.pairs)) for tree in trees):
        raise ValueError("a tree is larger than a forward pass may be")
    fewest = math.ceil(sum(tree.tokens for tree in trees) / limits.tokens)
    number = math.ceil(max(1, fewest) / multiple) * multiple
    while (bins := _fill(trees, limits, number)) is None:
        number += multiple
    stand_in = min(trees, key=lambda tree: tree.tokens)
    return [MicroBatch(tuple(held)) if held else MicroBatch((stand_in,), 0.0) for held in bins]


def _fill(trees: Sequence[Tree], limits: Limits, number: int) -> list[list[Tree]] | None:
    bins: list[list[Tree]] = [[] for _ in range(number)]
    tokens, pairs = [0] * number, [0] * number
    for tree in sorted(trees, key=lambda tree: -tree.tokens):
        place = min(range(number), key=tokens.__getitem__)
        if not limits.hold(tokens[place] + tree.tokens, pairs[place] + len(tree.pairs)):
            roomy = (i for i in range(number) if limits.hold(tokens[i] + tree.tokens, pairs[i] + len(tree.pairs)))
            place = min(roomy, key=tokens.__getitem__, default=-1)
            if place < 0:
                return None
        bins[place].append(tree)
        tokens[place] += tree.tokens
        pairs[place] += len(tree.pairs)
    return bins


def cut(data: PairDataset, trees: Sequence[Tree], limits: Limits, multiple: int = 1) -> list[MicroBatch]:
    """Trees of single pairs to micro-batches of padded rows: like lengths together, and padding counts as tokens."""
    width = {tree.pairs: max(data.lengths[side][tree.pairs[0]] for _, side in tree.responses) for tree in trees}
    bins: list[list[Tree]] = []
    rows = 0
    for tree in sorted(trees, key=lambda tree: width[tree.pairs]):
        rows += len(tree.responses)
        if not bins or not limits.hold(rows * width[tree.pairs], len(bins[-1]) + 1):
            bins.append([])
            rows = len(tree.responses)
        bins[-1].append(tree)
    stand_ins = -len(bins) % multiple
    return [MicroBatch(tuple(held)) for held in bins] + [MicroBatch((bins[0][0],), 0.0)] * stand_ins


def micro_batches(
    data: PairDataset, batch: IntArray, sides: Sequence[str], limits: Limits, *, packed: bool, multiple: int = 1
) -> list[MicroBatch]:
    """The forward passes of a batch, a multiple of `multiple` so that as many processes have equally many."""
    if packed:
        return pack(grow_trees(data, batch, sides, limits), limits, multiple)
    return cut(data, [tree_of(data, [int(pair)], sides) for pair in batch], limits, multiple)


def check_limits(data: PairDataset, sides: Sequence[str], tokens: int, *, packed: bool) -> None:
    """OrpoError naming the first pair that is longer than a forward pass may be."""
    if packed:
        needed = sum(data.lengths[side] for side in sides) - (len(sides) - 1) * data.prompt_lengths
    else:
        needed = len(sides) * np.max([data.lengths[side] for side in sides], axis=0)
    over = np.flatnonzero(needed > tokens)
    if len(over):
        row = int(over[0])
        raise OrpoError(
            f"row {row} (id {data.row_ids([row])[0]}): the pair takes {needed[row]} tokens, a forward pass at most "
            f"{tokens}: raise train.micro_batch_tokens (to {needed.max()} for all pairs) or lower tokenize.max_length"
        )


def by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Places of sequences that are padded together: those of like length, the longest first.

    Rows times the longest of them stay within `tokens`; a sequence that is over it runs alone.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(place)
    return batches
