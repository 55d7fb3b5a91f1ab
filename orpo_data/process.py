"""What a stage sets for the whole of its process while it works, so that its threads keep all cores busy."""

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager
from threading import Lock

import pyarrow as pa

_SELDOM = 1000
_KEPT_MS = 10_000
_ARROWS_CHOICE = "ARROW_DEFAULT_MEMORY_POOL"
_TOKENIZERS_POOL = "TOKENIZERS_PARALLELISM"
_PARTS_OF_MEMORY = "MALLOC_ARENA_MAX"
_M_ARENA_MAX, _AS_MANY_AS_THREADS = -8, 1 << 14  # the first as in malloc.h


class _Setting(ContextDecorator):
    """Several threads may be within, in any order: the first one in makes the change, the last one out undoes it."""

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change = change
        self._made = ExitStack()
        self._within = 0
        self._counting = Lock()

    def __enter__(self) -> None:
        with self._counting:
            if not self._within:
                self._made.enter_context(self._change())
            self._within += 1

    def __exit__(self, *error: object) -> None:
        with self._counting:
            self._within -= 1
            if not self._within:
                self._made.close()


@_Setting
@contextmanager
def few_full_collections() -> Iterator[None]:
    """Have young objects collected as ever, and all objects a hundred times less often.

    A full collection looks at every object of the process, for a quarter of a second with torch imported, in which no
    thread works. A stage's own objects are tables, which the collector has no part in. So around a whole `prepare`, or
    there would be one after each stage; around a stage, for flows run these one by one; around what a worker of a
    cluster does of one; and around the opening of a tokenizer, which imports torch.
    """
    young, middle, usual = gc.get_threshold()
    gc.set_threshold(young, middle, _SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*gc.get_threshold()[:2], usual)


@_Setting
@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have Arrow keep what a batch has freed for the next one; what nobody wants again is given back seconds later.

    Its usual allocator returns large buffers to the system at once, and the fresh pages of the next ones have to be
    cleared: some twentieth of the processor time of a stage. Where Arrow has no other, or the user chose one, it stays.
    """
    usual = pa.default_memory_pool()
    if _ARROWS_CHOICE in os.environ or "jemalloc" not in pa.supported_memory_backends():
        yield
        return
    kept = pa.jemalloc_memory_pool()
    pa.jemalloc_set_decay_ms(_KEPT_MS)  # of new arenas
    with ThreadPoolExecutor(1) as idle:
        idle.submit(pa.allocate_buffer, 1, kept).result()  # a thread that frees nothing takes the first arena
        pa.set_memory_pool(kept)
        try:
            yield
        finally:
            pa.set_memory_pool(usual)


@_Setting
@contextmanager
def tokenizing_in_own_threads() -> Iterator[None]:
    """Have the package tokenizers work in the thread that calls it, unless the user said otherwise.

    Its own pool of threads is for who calls it from one: several would wait for that pool, with cores idle.
    """
    if _TOKENIZERS_POOL in os.environ:
        yield
        return
    os.environ[_TOKENIZERS_POOL] = "false"  # it looks there at every call
    try:
        yield
    finally:
        os.environ.pop(_TOKENIZERS_POOL, None)


def threads_allocate_apart() -> None:
    """Have the C library give each thread its own part of memory, for good, unless the user said otherwise.

    glibc stops at eight parts a core. Packages start more threads than that; which ones share a part is chance, and two
    that work on texts then wait for each other's every string: a fifth of the time, in one run of five.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and _PARTS_OF_MEMORY not in os.environ:
        library.mallopt(_M_ARENA_MAX, _AS_MANY_AS_THREADS)


def trim() -> None:
    """Have the C library return the memory that it keeps of what was freed; one that cannot has nothing to say."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # glibc, where arrays of a million rows leave 100 MB
        library.malloc_trim(0)
