"""Guards a scheduled run: a stage whose rows drifted too far from its previous output does not replace it.

The comparison takes place inside each data stage, when its new rows are written beside the old folder and before they
take its place. So a folder is never replaced by what was refused; the stages after it, and training, do not run; and
the next night compares with the same accepted version again. The alternative, to prepare a whole run aside and swap it
in, would cost every unchanged stage again and a swap of six folders that is not atomic. Its price: stages before the
refused one, which passed, are newer than what the kept dataset was made of, and `orpo lineage` says so.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from orpo_data.errors import OrpoError
from orpo_data.manifest import Manifest, read_manifest
from orpo_data.shards import check_sizes
from orpo_data.stage import Review

log = logging.getLogger(__name__)


class DriftConfig(BaseModel):
    """How far a data stage may move away from its previous output; null sets no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_rows_lost: float | None = Field(
        default=0.05, ge=0, le=1, description="Share of the previous rows that is gone."
    )
    max_rows_changed: float | None = Field(
        default=0.2, ge=0, le=1, description="Share of the previous rows that is there with another content."
    )
    max_drop_rate_rise: float | None = Field(
        default=0.05, ge=0, le=1, description="Rise of the share of the rows read that a step drops for one reason."
    )
    max_distribution_shift: float | None = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Distance between the old and the new distribution of a length, score or name: Kolmogorov-Smirnov "
        "for numbers, total variation for names; both are shares of rows.",
    )


class DriftError(OrpoError):
    """The new rows are too far from the previous ones; `diff` is the comparison as plain values."""

    def __init__(self, message: str, diff: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.diff = diff or {}


def reviewer(thresholds: DriftConfig, output: Path) -> Review:
    """Compares what is about to take the place of `output` with what is there; raises DriftError to keep that."""

    def review(folder: Path, manifest: Manifest) -> dict[str, Any]:
        try:
            previous = read_manifest(output)
            check_sizes(output, previous)
        except OrpoError as error:
            if output.exists():
                log.warning("%s: cannot be compared with the new rows: %s", output, error)
            return {}
        from orpo_data.comparison import compare  # polars, and only when there is something to compare

        found = compare(output, previous, folder, manifest)
        diff = replace(found, new=replace(found.new, path=str(output))).to_json()
        if reasons := list(exceeded(diff, thresholds)):
            raise DriftError(
                f"{manifest.stage}: too far from the previous rows in {output}, which stay: {'; '.join(reasons)}; "
                "to accept the new rows, run once with --set drift=null",
                diff,
            )
        return diff

    return review


def exceeded(diff: dict[str, Any], thresholds: DriftConfig) -> Iterator[str]:
    """Each threshold that a comparison passes, by how much, in words."""
    old, new = diff["old"], diff["new"]
    measured = [
        ("max_rows_lost", diff["rows_out"] / old["rows"], "of the rows are gone"),
        ("max_rows_changed", diff["rows_changed"] / old["rows"], "of the rows changed"),
    ]
    for drops in diff["dropped"]:
        rise = drops["new"] / new["rows_read"] - drops["old"] / old["rows_read"]
        measured.append(("max_drop_rate_rise", rise, f"more of the rows read are dropped as {drops['reason']}"))
    for shift in diff["shifts"]:
        measured.append(
            ("max_distribution_shift", shift["distance"], f"of the distribution of {shift['column']} moved")
        )
    for name, value, what in measured:
        limit = getattr(thresholds, name)
        if limit is not None and value > limit:
            yield f"{value:.1%} {what} (drift.{name} is {limit:.1%})"
