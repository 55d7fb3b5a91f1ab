"""Which of many sketched texts are alike, in arrays: candidates band by band, then their exact similarity.

The sketches stay where they are, e.g. in memory-mapped files; what is worked on are numbers of rows. No result depends
on the order of the rows, save on that by which the caller ranks them.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orpo_data.mapped import let_go
from orpo_data.steps.minhash import LEAST_PART
from orpo_data.steps.tokens import Hashes, distinct, ordered

AT_ONCE = 1 << 19  # shingles that a thread compares at once
THREADS = 8  # at most: each takes 40 MB
ROWS_MAPPED = 500  # that are looked up before their pages are given back: a look maps 64 KB around it
ROWS_READ = 16_000  # that are gone through before
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)

Rows = NDArray[np.int64]
Counts = NDArray[np.int64]

NO_ROWS = np.empty(0, np.int64)
NO_PAIRS = np.empty(0, np.uint64)


class Alike(NamedTuple):
    """Pairs of texts that are similar enough."""

    first: Rows
    second: Rows
    similarity: NDArray[np.float64]


class _Chunk(NamedTuple):
    """Views of the sketches in one chunk of a table."""

    ends: NDArray[np.int32]
    shingles: NDArray[np.uint32]
    bands: NDArray[np.uint32]  # rows * bands


class Sketches:
    """The sketches of a table with the columns of `minhash.sketches`."""

    def __init__(self, table: pa.Table, threshold: float) -> None:
        self.threshold = threshold
        pairs = zip(table["shingles"].chunks, table["bands"].chunks, strict=True)
        self._chunks = [
            _Chunk(runs.offsets.to_numpy(), runs.values.to_numpy(), _matrix(bands)) for runs, bands in pairs
        ]
        self._starts = np.cumsum([0, *map(len, table["bands"].chunks)])
        none = pa.nulls(0, table.schema.field("sizes").type)
        self.sizes = np.concatenate([_matrix(chunk) for chunk in (none, *table["sizes"].chunks)])
        self.bands: int = table.schema.field("bands").type.list_size

    def each_band(self, rows: Rows) -> Iterator[NDArray[np.uint32]]:
        """One band of `rows` after the other."""
        if 4 * len(rows) <= len(self.sizes):  # few enough to have all their bands at once
            found = np.empty((len(rows), self.bands), np.uint32)
            for chunk, places, within in self._by_chunk(rows):
                found[places] = chunk.bands[within]
            yield from np.ascontiguousarray(found.T)
        else:
            for number in range(self.bands):
                yield self._band(number)[rows]

    def _band(self, number: int) -> NDArray[np.uint32]:
        """One band of all rows, which lies between the others: to read it is to map them all."""
        found, mapped = [], 0
        for chunk in self._chunks:
            found.append(chunk.bands[:, number].copy())
            if (mapped := mapped + len(chunk.bands)) >= ROWS_READ:
                let_go()
                mapped = 0
        let_go()
        return np.concatenate(found)

    def buckets(self, rows: Rows) -> Iterator["Buckets"]:
        """Band after band the places in `rows` of those that share it with others."""
        for band in self.each_band(rows):
            keys = ordered(_above(band, np.arange(len(rows))))
            yield Buckets.of((keys & LOW).astype(np.int64), keys >> HALF)

    def alike(self, rows: Rows, first: Rows, second: Rows) -> Alike:
        """Those of the pairs (first[i], second[i]), places in `rows`, that are similar enough."""
        near = self._could_be(rows[first], rows[second])
        first, second = first[near], second[near]
        work = np.cumsum(self.sizes[rows[first]].sum(1) + self.sizes[rows[second]].sum(1), dtype=np.int64) // AT_ONCE
        cuts, found = np.flatnonzero(np.diff(work)) + 1, [np.empty(0)]
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:  # sorting, most of the work, needs no lock
            for some in pool.map(self.similarity, np.split(rows[first], cuts), np.split(rows[second], cuts)):
                found.append(some)
                let_go()
        similarity = np.concatenate(found)
        enough = similarity >= self.threshold
        return Alike(first[enough], second[enough], similarity[enough])

    def similarity(self, first: Rows, second: Rows) -> NDArray[np.float64]:
        """Jaccard similarity of all parts together; 0 where one part has hardly anything in common.

        A long prompt that two rows share must not make near-duplicates of answers that differ altogether.
        """
        keys = np.concatenate([self._keys(first), self._keys(second)])
        keys.sort(kind="stable")  # merges runs that are sorted already, as those of each part are
        twice = (keys[1:][keys[1:] == keys[:-1]] >> HALF).astype(np.int64)
        parts = self.sizes.shape[1]
        shared = np.bincount(twice, minlength=len(first) * parts).reshape(len(first), parts)
        return _jaccard(shared, self.sizes[first].astype(np.int64) + self.sizes[second] - shared)

    def _could_be(self, first: Rows, second: Rows) -> NDArray[np.bool_]:
        """Whether texts of these sizes can be similar enough: at most all of the smaller one is shared."""
        sizes = self.sizes[first].astype(np.int64), self.sizes[second].astype(np.int64)
        return _jaccard(np.minimum(*sizes), np.maximum(*sizes)) >= self.threshold

    def _keys(self, rows: Rows) -> Hashes:
        """Every shingle of `rows` as one number: its place in `rows` and its part above the 32 bits of its hash."""
        found = [NO_PAIRS]
        for chunk, places, within in self._by_chunk(rows):
            sizes = self.sizes[rows[places]]
            lengths = sizes.sum(1, dtype=np.int64)
            begins = chunk.ends[within] - np.cumsum(lengths) + lengths
            hashes = chunk.shingles[np.repeat(begins, lengths) + np.arange(lengths.sum())]
            slots = places[:, None] * sizes.shape[1] + np.arange(sizes.shape[1])
            found.append(_above(np.repeat(slots.ravel(), sizes.ravel()), hashes))
        return np.concatenate(found)

    def _by_chunk(self, rows: Rows) -> Iterator[tuple["_Chunk", Rows, Rows]]:
        """Each chunk that has some of the rows, with their places in `rows` and in the chunk.

        What is kept of a chunk must be a copy.
        """
        mapped = 0
        order = np.argsort(rows, kind="stable")
        chunks = np.searchsorted(self._starts, rows[order], "right") - 1
        for places in np.split(order, np.flatnonzero(np.diff(chunks)) + 1) if len(rows) else []:
            number = int(np.searchsorted(self._starts, rows[places[0]], "right")) - 1
            if (mapped := mapped + len(places)) > ROWS_MAPPED:
                let_go()
                mapped = len(places)
            yield self._chunks[number], places, rows[places] - self._starts[number]


class Buckets(NamedTuple):
    """Texts that share a band, bucket after bucket, each in ascending order; no bucket of a single one."""

    members: Rows
    starts: Rows  # of each member's bucket, in `members`

    @classmethod
    def of(cls, members: Rows, labels: NDArray[np.generic]) -> Self:
        """From the members of labels that run together."""
        new = np.ones(len(labels) + 1, bool)
        np.not_equal(labels[1:], labels[:-1], out=new[1:-1])
        several = ~(new[:-1] & new[1:])
        return cls(members[several], _last(new[:-1][several]))

    def without(self, gone: NDArray[np.bool_]) -> Self:
        """What is left without some members."""
        return self.of(self.members[~gone], self.starts[~gone])

    def of_several(self, labels: Rows) -> Self:
        """The buckets whose members differ in their label."""
        differs = labels[self.members] != labels[self.members[self.starts]]
        return self.without(~self.each(np.logical_or, differs))

    def first(self, wanted: NDArray[np.bool_]) -> Rows:
        """For each member the place of the first one in its bucket that is wanted; the number of members if none."""
        places = np.where(wanted, np.arange(len(wanted)), len(wanted))
        return self.each(np.minimum, places)

    def each(self, total: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        """The total of its bucket's values for each member."""
        heads = np.flatnonzero(self.starts == np.arange(len(values)))
        return np.repeat(total.reduceat(values, heads), np.diff(heads, append=len(values)))


def best_first(sketches: Sketches, rows: Rows) -> Alike:
    """Rows, best first, cut down to those that are like no better one that is left.

    `first` has the places in `rows` of those that go, `second` that of the most similar one that stays (of several the
    best). A row stays once no better one that shares a bucket with it is undecided; then worse ones like it go.
    """
    found = Alike(NO_ROWS, NO_ROWS, np.empty(0))
    undecided, shares = np.ones(len(rows), bool), np.zeros(len(rows), bool)
    for bucket in sketches.buckets(rows):
        shares[bucket.members] = True
    left = np.flatnonzero(shares)
    while len(left):
        blocked = np.zeros(len(left), bool)
        for bucket in sketches.buckets(rows[left]):
            leader = bucket.first(undecided[left[bucket.members]])
            blocked[bucket.members[np.arange(len(leader)) > leader]] = True
        stays, pairs = undecided[left] & ~blocked, NO_PAIRS
        for bucket in sketches.buckets(rows[left]):
            leader = bucket.first(stays[bucket.members])
            behind = np.flatnonzero(np.arange(len(leader)) > leader)
            pairs = _with(pairs, left[bucket.members[behind]], left[bucket.members[leader[behind]]])
        alike = sketches.alike(rows, *_halves(pairs))
        found = _closest(found, alike)
        undecided[alike.first] = False
        left = left[blocked]
    return found


def chains(sketches: Sketches, rows: Rows) -> Rows:
    """A number for each of `rows`, the same for two that are alike or linked by a chain of such."""
    labels = np.arange(len(rows))
    for bucket in sketches.buckets(rows):
        while len((bucket := bucket.of_several(labels)).members):
            first, second = bucket.members[bucket.starts], bucket.members
            unlinked = labels[first] != labels[second]
            labels = _linked(labels, sketches.alike(rows, first[unlinked], second[unlinked]))
            bucket = bucket.without(bucket.starts == np.arange(len(second)))
    return labels


def across(sketches: Sketches, some: Rows, others: Rows) -> Alike:
    """Every one of `some` with every one of `others` that it is like: `first` and `second` have their places."""
    rows, pairs = np.concatenate([some, others]), NO_PAIRS
    for bucket in sketches.buckets(rows):
        ours = bucket.members < len(some)  # first in each bucket
        many = np.where(ours, 0, bucket.each(np.add, ours.astype(np.int64)))
        steps = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        pairs = _with(pairs, bucket.members[np.repeat(bucket.starts, many) + steps], np.repeat(bucket.members, many))
    first, second = _halves(pairs)
    alike = sketches.alike(rows, first, second)
    return alike._replace(second=alike.second - len(some))


def _with(pairs: Hashes, first: Rows, second: Rows) -> Hashes:
    """Distinct pairs, with more of them."""
    return distinct(np.concatenate([pairs, _above(first, second)]))


def _above(high: NDArray[Any], low: NDArray[Any]) -> Hashes:
    """Two numbers of 32 bits in one."""
    return high.astype(np.uint64) << HALF | low.astype(np.uint64)


def _halves(pairs: Hashes) -> tuple[Rows, Rows]:
    return (pairs >> HALF).astype(np.int64), (pairs & LOW).astype(np.int64)


def _closest(*found: Alike) -> Alike:
    """Of each `first` the most similar `second`, of several the lowest."""
    first, second, similarity = map(np.concatenate, zip(*found, strict=True))
    order = np.lexsort((second, -similarity, first))
    order = order[np.diff(first[order], prepend=-1) != 0]
    return Alike(first[order], second[order], similarity[order])


def _linked(labels: Rows, alike: Alike) -> Rows:
    """Labels, each the lowest place in its chain, with more links."""
    while (apart := labels[alike.first] != labels[alike.second]).any():
        a, b = labels[alike.first[apart]], labels[alike.second[apart]]
        np.minimum.at(labels, np.maximum(a, b), np.minimum(a, b))
        while (labels != (further := labels[labels])).any():
            labels = further
    return labels


def _jaccard(shared: Counts, either: Counts) -> NDArray[np.float64]:
    """From what the parts of pairs share and have together, pairs * parts."""
    whole = either.sum(1)
    found = np.where(whole > 0, shared.sum(1) / np.maximum(whole, 1), 1.0)
    return np.where((shared < LEAST_PART * either).any(1), 0.0, found)


def _last(new: NDArray[np.bool_]) -> Rows:
    """Of each place the last one up to it that is new."""
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def _matrix(lists: pa.FixedSizeListArray) -> NDArray[np.uint32]:
    numbers: NDArray[np.uint32] = lists.flatten().to_numpy()
    return numbers.reshape(len(lists), lists.type.list_size)
