"""A dataset and the datasets it was made of, as far as they still lie where its manifest says."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from orpo_data.errors import OrpoError
from orpo_data.manifest import Input, Manifest, StepCounts, read_manifest


@dataclass(frozen=True)
class Stage:
    """One dataset of the chain; `path` is its folder as seen from the last one, "" for the last one itself."""

    manifest: Manifest
    path: str = ""

    @property
    def branches(self) -> list[tuple[str | None, list[StepCounts]]]:
        """The steps of each source's branch, in the order they were run."""
        return [(source, list(steps)) for source, steps in groupby(self.manifest.steps, key=lambda step: step.source)]

    @property
    def title(self) -> str:
        """The stage, and the source where it has only one."""
        sources = [source for source, _ in self.branches]
        return " · ".join([self.manifest.stage, *filter(None, sources if len(sources) == 1 else [])])


def read_chain(folder: Path, manifest: Manifest) -> list[Stage]:
    """Every dataset that `manifest`, of `folder`, was made of, each behind its inputs, and itself at the end.

    An earlier dataset counts only if it is the very content that was read; where one input is missing or has
    changed, the chain begins with the dataset that read it.
    """
    stages: dict[str, Stage] = {}
    for stage in _earlier(folder, manifest, ""):
        stages.setdefault(stage.path, stage)
    return [*stages.values(), Stage(manifest)]


def _earlier(folder: Path, manifest: Manifest, path: str) -> Iterator[Stage]:
    found = [(item.path, read_input(folder, item)) for item in manifest.inputs]
    known = [(to, earlier) for to, earlier in found if to is not None and earlier is not None]
    if len(known) < len(found):
        return
    for to, earlier in known:
        place = os.path.normpath(os.path.join(path, to))
        yield from _earlier(folder / to, earlier, place)
        yield Stage(earlier, place)


def read_input(folder: Path, item: Input) -> Manifest | None:
    """The manifest of an input of the dataset in `folder`, if its content is still the one that was read."""
    if item.path is None:
        return None
    try:
        manifest = read_manifest(folder / item.path)
    except OrpoError:
        return None
    return manifest if manifest.content_hash == item.content_hash else None


def title(manifest: Manifest) -> str:
    """How a dataset is called on its pages."""
    return f"{manifest.recipe.get('name', 'dataset')}: {manifest.stage}"


def raw_rows(chain: Sequence[Stage]) -> int:
    """Rows that came in where the chain begins: records of raw files, if it goes back that far."""
    first = chain[0].manifest.stage
    begins = [stage for stage in chain if stage.manifest.stage == first]
    return sum(stage.manifest.rows_in for stage in begins)
