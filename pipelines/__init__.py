"""Puts stages together: recipes, the stages they name, and the runs made of them. Knows no Prefect.

>>> from pipelines import Recipe, prepare
>>> reports = prepare(Recipe.read("hh-rlhf"), "runs/hh")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.preparation import prepare
    from pipelines.recipe import Recipe

__all__ = ["Recipe", "prepare"]

_HOMES = {"Recipe": "pipelines.recipe", "prepare": "pipelines.preparation"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
