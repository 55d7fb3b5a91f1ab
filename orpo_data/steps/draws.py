"""Random draws that belong to a row, not to its place: the same row draws the same number everywhere."""

import hashlib


def draw(seed: int, *key: str) -> int:
    """A uniform 64-bit integer from (seed, key): no order, batch size or worker count changes it."""
    text = "\x1f".join((str(seed), *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def uniform(seed: int, *key: str) -> float:
    """A uniform float in [0, 1) from (seed, key)."""
    return (draw(seed, *key) >> 11) / 2**53
