"""A recipe whose comparison is trained in a few seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.recipe import Recipe


@pytest.fixture(scope="session")
def comparing(make_recipe: Callable[..., Recipe], tiny_model_dir: Path) -> Callable[..., Recipe]:
    """A recipe with a `train` and a `compare` section, and `key.path=value` overrides."""
    train = "max_steps: 2, batch_size: 4, precision: fp32, learning_rate: 0.01, eval_every: 1"
    least = (f"train={{model: '{tiny_model_dir}', {train}}}", "compare={seeds: [1]}")
    return lambda *overrides: make_recipe(*least, *overrides)
