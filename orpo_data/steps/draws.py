"""Random draws that belong to a row, not to its place: the same row draws the same number everywhere."""

import hashlib
from typing import Annotated

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from orpo_data.hashing import number_hashes

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # as a manifest can have it


def draw_text(seed: int, *key: str) -> str:
    return "\x1f".join((str(seed), *key))


def draw(seed: int, *key: str) -> int:
    """A uniform 64-bit integer from (seed, key): no order, batch size or worker count changes it."""
    text = draw_text(seed, *key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def draws(seed: int, name: str, keys: pl.Series) -> NDArray[np.uint64]:
    """`draw(seed, name, key)` for each key."""
    return number_hashes(draw_text(seed, name, "") + keys)


def uniform(seed: int, *key: str) -> float:
    """A uniform float in [0, 1) from (seed, key)."""
    return (draw(seed, *key) >> 11) / 2**53


def uniforms(seed: int, name: str, keys: pl.Series) -> NDArray[np.float64]:
    """`uniform(seed, name, key)` for each key."""
    return (draws(seed, name, keys) >> np.uint64(11)) / 2**53
