"""Python's garbage collector, kept from stopping all threads of a stage.

Around a whole `prepare`, or there would be a full collection after each stage; around a stage, for flows run these one
by one; around what a worker of a cluster does of one; and around the opening of a tokenizer, which imports torch.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_SELDOM = 1000
_CHANGING = Lock()
_within = 0
_usual = 0


@contextmanager
def few_full_collections() -> Iterator[None]:
    """Have young objects collected as ever, and all objects a hundred times less often; several threads may be within.

    A full collection looks at every object of the process, for a quarter of a second with torch imported, in which no
    thread works. A stage's own objects are tables, which the collector has no part in.
    """
    _count(+1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    """The first one in changes the threshold, the last one out changes it back."""
    global _within, _usual
    with _CHANGING:
        if not _within:
            _usual = gc.get_threshold()[2]
        _within += change
        gc.set_threshold(*gc.get_threshold()[:2], _SELDOM if _within else _usual)
