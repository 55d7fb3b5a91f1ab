"""What is known of the data sets that recipes name: their licence, and what their users should know."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orpo_data.manifest import Manifest
from orpo_data.places import public_url


@dataclass(frozen=True)
class Upstream:
    """A published data set. `caveats` are what its authors and later readers found."""

    title: str
    licence: str | None  # as the hub writes it; None where only the user can know
    language: str | None
    caveats: tuple[str, ...] = ()


UPSTREAMS = {
    "ultrafeedback": Upstream(
        "UltraFeedback",
        licence="mit",
        language="en",
        caveats=(
            "UltraFeedback's ratings are GPT-4's, not people's. 2,628 of its published overall scores are ten times "
            "too high; the revision of the ready recipes is the repaired one.",
            "Every answer of UltraFeedback was written under its own hidden system prompt (columns system_chosen, "
            "system_rejected), which the prompt here does not show.",
        ),
    ),
    "hh-rlhf": Upstream(
        "HH-RLHF",
        licence="mit",
        language="en",
        caveats=(
            "HH-RLHF holds red-team dialogues: expect offensive text, in chosen answers too.",
            "In HH-RLHF over a quarter of the pairs have low or no agreement with a committee of reward models "
            "(arXiv 2410.01957).",
        ),
    ),
    "pairs": Upstream("pairs of your own", licence=None, language=None),
}


PLACES = ("path", "tokenizer", "chat_template")
"""Names of settings that say where something lies."""


@dataclass(frozen=True)
class SourceOfRows:
    """A source of a recipe, as far as its rows are in a dataset."""

    label: str
    dataset: str
    place: str  # hub id, or the last part of a local path
    revision: str | None

    @property
    def upstream(self) -> Upstream:
        return UPSTREAMS.get(self.dataset, Upstream(self.dataset, None, None))


def sources_of(manifest: Manifest, labels: Iterable[str | None]) -> list[SourceOfRows]:
    """The recipe's sources that have rows under one of `labels`, in the recipe's order."""
    present = set(labels)
    sources = [
        SourceOfRows(
            label=source.get("name") or source["dataset"],
            dataset=source["dataset"],
            place=public_place(source["path"]),
            revision=source.get("revision"),
        )
        for source in manifest.recipe.get("sources", [])
    ]
    return [source for source in sources if source.label in present]


def public_place(path: str) -> str:
    """Where data came from, for others to read: no folder of one's own machine, no password, no signed address."""
    if "://" in path:
        return public_url(path)
    local = path.startswith(("/", ".", "~")) or "\\" in path or path.count("/") > 1
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if local else path


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that the rows depend on, without the places that are nobody else's business."""
    return {name: public(value) for name, value in recipe.items() if name not in ("train", "evaluate")}


def public(value: Any) -> Any:
    """Settings or findings with every place in them as `public_place` has it."""
    if isinstance(value, Mapping):
        return {
            name: public_place(item) if name in PLACES and isinstance(item, str) else public(item)
            for name, item in value.items()
        }
    return [public(item) for item in value] if isinstance(value, list) else value
