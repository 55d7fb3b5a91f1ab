"""Two versions of a dataset told apart: which rows came, went and changed, why, and how the distributions moved.

A row is the same in both versions if it has the same id, its content hash; those of the same raw record are matched
first, so that duplicates keep apart. What is left on both sides is matched by raw record: the same origin, another
content. Token ids carry no origin: theirs are looked up in the dataset they were made of, as long as that is there.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from orpo_data.chain import origins, read_sound_chain
from orpo_data.distributions import Shift, shifts
from orpo_data.errors import OrpoError
from orpo_data.manifest import Manifest, StepCounts, read_manifest
from orpo_data.places import as_path
from orpo_data.schema import ORIGIN_COLUMNS
from orpo_data.shards import check_sizes
from orpo_data.stage import key_changes

PLACE = {"source_file", "source_row"}  # a row that stands elsewhere in the raw files is still the same row


@dataclass(frozen=True)
class Version:
    """One side of a comparison."""

    path: str
    stage: str
    content_hash: str
    rows_read: int
    rows: int


@dataclass(frozen=True)
class Move:
    """Rows that only one version has: where they fell in the other.

    All three are null where they are not to be found there, dropped rows included: their raw record is gone, or no
    longer gives such a row.
    """

    stage: str | None
    step: str | None
    reason: str | None
    rows: int


@dataclass(frozen=True)
class Drops:
    """How many rows a step of this stage dropped for one reason, in each version."""

    step: str
    reason: str
    old: int
    new: int


@dataclass(frozen=True)
class Diff:
    """What it takes to get from one version to the other.

    old.rows == rows_same + rows_changed + rows_out, new.rows == rows_same + rows_changed + rows_in.
    """

    old: Version
    new: Version
    rows_same: int
    rows_changed: int  # of one raw record, or with one id, but not alike in every column
    rows_out: int
    rows_in: int
    changed_columns: dict[str, int]  # changed rows by the column that differs, most frequent first
    why_out: tuple[Move, ...]  # most frequent first
    why_in: tuple[Move, ...]
    dropped: tuple[Drops, ...]
    settings: tuple[str, ...]  # what else the rows depend on: `path: old -> new`
    shifts: tuple[Shift, ...]  # largest first

    @property
    def empty(self) -> bool:
        """Both are made in the same way and hold the same rows, kept and dropped."""
        moved = self.rows_changed or self.rows_out or self.rows_in or self.settings
        return not moved and all(drops.old == drops.new for drops in self.dropped)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"empty": self.empty}


def diff(old: str | Path, new: str | Path) -> Diff:
    """Compare two versions of a dataset, both the output of one data stage.

    Raises OrpoError where one of them is no such thing, or is broken.
    """
    folders = as_path(old), as_path(new)
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        check_sizes(folder, manifest)
    return compare(folders[0], manifests[0], folders[1], manifests[1])


def compare(old: Path, old_manifest: Manifest, new: Path, new_manifest: Manifest) -> Diff:
    """As `diff`, for folders whose manifests are known; the new one need not be written yet."""
    _require_one_stage(old, old_manifest, new, new_manifest)
    before, after = _Side(old, old_manifest), _Side(new, new_manifest)
    matched = _match(before.rows, after.rows)
    changes = _changed_columns(before.rows[matched["old"]], after.rows[matched["new"]])
    changed = int(changes.select(pl.any_horizontal(pl.all())).to_series().sum())
    by_column = {name: int(changes[name].sum()) for name in changes.columns}
    gone = before.rows[_others(matched["old"], before.rows)]
    come = after.rows[_others(matched["new"], after.rows)]
    return Diff(
        old=before.version,
        new=after.version,
        rows_same=len(matched) - changed,
        rows_changed=changed,
        rows_out=len(gone),
        rows_in=len(come),
        changed_columns=dict(sorted(((n, c) for n, c in by_column.items() if c), key=lambda item: (-item[1], item[0]))),
        why_out=after.falls(gone),
        why_in=before.falls(come),
        dropped=tuple(_drops(old_manifest, new_manifest)),
        settings=tuple(key_changes(_settings(old_manifest), _settings(new_manifest))),
        shifts=shifts(before.rows.lazy(), after.rows.lazy()),
    )


def _require_one_stage(old: Path, old_manifest: Manifest, new: Path, new_manifest: Manifest) -> None:
    for folder, manifest in ((old, old_manifest), (new, new_manifest)):
        if not manifest.dropped:
            raise OrpoError(f"{folder}: is the output of {manifest.stage}; datasets are compared, not models")
    if old_manifest.stage != new_manifest.stage:
        raise OrpoError(
            f"{old} is the output of {old_manifest.stage}, {new} that of {new_manifest.stage}: "
            "compare two versions of one stage's output"
        )


class _Side:
    """A version's rows, with origins where they can be known, and the rows that fell on the way to it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.version = Version(str(path), manifest.stage, manifest.content_hash, manifest.rows_in, manifest.rows)
        self._nodes = [node for node in read_sound_chain(path, manifest) if node.manifest.dropped]
        self.rows = self._rows()

    def _rows(self) -> pl.DataFrame:
        *before, last = self._nodes
        rows = last.kept
        if "source_row" in rows.collect_schema() or not before:
            return rows.collect()
        places = origins(before).unique("id", keep="first", maintain_order=True)
        return rows.join(places.select("id", *PLACE), on="id", how="left", maintain_order="left").collect()

    def falls(self, rows: pl.DataFrame) -> tuple[Move, ...]:
        """Where `rows` of the other version fell in this one."""
        falls = pl.concat(
            node.dropped.select(
                "id", *ORIGIN_COLUMNS, fall=pl.struct("step", "reason", stage=pl.lit(node.manifest.stage))
            )
            for node in self._nodes
        )
        found, keys = rows.lazy(), _keys(rows)
        for index, key in enumerate(keys):
            first = falls.unique(key, keep="first", maintain_order=True)
            found = found.join(first.select(*key, pl.col("fall").alias(f"fall{index}")), on=key, how="left")
        fall = pl.coalesce(f"fall{index}" for index in range(len(keys)))
        counts = found.group_by(fall.alias("fall")).len("rows").collect().to_dicts()
        moves = (Move(**(entry["fall"] or NOWHERE), rows=entry["rows"]) for entry in counts)
        return tuple(sorted(moves, key=lambda move: (-move.rows, str(move))))


NOWHERE = {"stage": None, "step": None, "reason": None}


def _keys(*sides: pl.DataFrame) -> list[list[str]]:
    """What rows are matched by, the surest first."""
    if all("source_row" in rows.columns for rows in sides):
        return [[*ORIGIN_COLUMNS, "id"], ["id"], ORIGIN_COLUMNS]
    return [["id"]]


def _match(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """Positions of the rows that belong together: columns `old` and `new`, each position at most once."""
    left, right = (rows.select(pl.int_range(pl.len()).alias("at"), *_keys(old, new)[0]) for rows in (old, new))
    pairs = []
    for key in _keys(old, new):
        left, right = (_numbered(rows, key) for rows in (left, right))
        both = left.join(right, on=[*key, "n"], how="inner").select(old="at", new="at_right")
        left, right = (
            rows.filter(~pl.col("at").is_in(both[side].implode())) for rows, side in ((left, "old"), (right, "new"))
        )
        pairs.append(both)
    return pl.concat(pairs).sort("old")


def _numbered(rows: pl.DataFrame, key: list[str]) -> pl.DataFrame:
    """Rows with one key are told apart by their place in the order of the ids, which no order of rows changes."""
    return rows.sort("id", "at").with_columns(n=pl.int_range(pl.len()).over(key))


def _others(positions: pl.Series, rows: pl.DataFrame) -> pl.Series:
    everything = pl.int_range(len(rows), eager=True)
    return everything.filter(~everything.is_in(positions.implode()))


def _changed_columns(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """For rows that belong together: whether each column differs."""
    names = [name for name in old.columns if name in new.columns and name not in PLACE]
    return pl.DataFrame({name: old[name].ne_missing(new[name]) for name in names})


def _drops(old: Manifest, new: Manifest) -> Iterator[Drops]:
    before, after = (_drop_counts(manifest) for manifest in (old, new))
    for step, reason in dict.fromkeys([*before, *after]):
        yield Drops(step, reason, before[step, reason], after[step, reason])


def _drop_counts(manifest: Manifest) -> Counter[tuple[str, str]]:
    return Counter({(_label(step), reason): rows for step in manifest.steps for reason, rows in step.dropped.items()})


def _settings(manifest: Manifest) -> dict[str, Any]:
    """What the rows depend on, by the names people know: inputs by name, steps by theirs."""
    steps = {_label(step): {"version": step.version, **step.config} for step in manifest.steps}
    columns = {"columns": manifest.key["columns"]} if "columns" in manifest.key else {}
    return {"input": {item.name: item.fingerprint[:12] for item in manifest.inputs}, **columns, **steps}


def _label(step: StepCounts) -> str:
    return f"{step.step} of {step.source}" if step.source else step.step
