"""What a stage sets for its process is set while it works, and as ever afterwards."""

import gc
import os
import platform
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from transformers import AutoTokenizer

from orpo_data import process
from orpo_data.chat import Chat
from orpo_data.errors import OrpoError
from orpo_data.parts import PartRun, run_here, segments_of
from orpo_data.process import (
    few_full_collections,
    freed_memory_kept,
    threads_allocate_apart,
    tokenizing_in_own_threads,
    trim,
)


@pytest.fixture
def usual() -> Iterator[tuple[int, int, int]]:
    """A threshold that is nobody's default."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 7)
    yield gc.get_threshold()
    gc.set_threshold(*before)


def test_the_last_one_out_restores_the_threshold_in_whatever_order_they_leave(usual: tuple[int, int, int]) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(few_full_collections)
    second.enter_context(few_full_collections)
    assert gc.get_threshold()[:2] == usual[:2]
    assert gc.get_threshold()[2] > usual[2]
    first.close()
    assert gc.get_threshold()[2] > usual[2]
    second.close()
    assert gc.get_threshold() == usual


def test_in_again_after_the_last_one_left(usual: tuple[int, int, int]) -> None:
    for _ in range(2):
        with few_full_collections:
            assert gc.get_threshold()[2] > usual[2]
        assert gc.get_threshold() == usual


def test_many_threads_go_in_and_out(usual: tuple[int, int, int]) -> None:
    def work(_: int) -> int:
        with few_full_collections:
            return gc.get_threshold()[2]

    with ThreadPoolExecutor(8) as pool:
        assert min(pool.map(work, range(400))) > usual[2]
    assert gc.get_threshold() == usual


def test_young_garbage_is_collected_within(usual: tuple[int, int, int]) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    with few_full_collections:
        seen = weakref.ref(Cycle())
        young = [[number] for number in range(10 * usual[0])]
        assert len(young) > usual[0]
        assert seen() is None


@pytest.mark.parametrize("error", [None, OSError("gone")])
def test_while_a_tokenizer_is_opened(
    chat_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, usual: tuple[int, int, int], error: OSError | None
) -> None:
    opened, within = AutoTokenizer.from_pretrained, []

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        within.append(gc.get_threshold()[2])
        if error:
            raise error
        return opened(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(OrpoError) if error else nullcontext():
        Chat.load(str(chat_tokenizer_dir))
    assert within[0] > usual[2]
    assert gc.get_threshold() == usual


def test_while_a_stage_runs(toys: Any, tmp_path: Path, usual: tuple[int, int, int]) -> None:
    within = []
    parts = [toys.part("a", tuple(range(20)))]
    toys.run(tmp_path / "numbers", parts, [("first", 2)], review=lambda *_: within.append(gc.get_threshold()[2]) or {})
    assert within[0] > usual[2]
    assert gc.get_threshold() == usual


def test_while_a_worker_has_a_part(toys: Any, tmp_path: Path, usual: tuple[int, int, int]) -> None:
    within = []
    part = toys.part("a", (1, 2))
    run = PartRun(part, tmp_path, next(part.read(1)).schema, "key")
    (segment,) = segments_of(toys.chain([("without", 2)]))
    run_here(segment, [run], 2, lambda rows: within.append(gc.get_threshold()[2]))
    assert within[0] > usual[2]
    assert gc.get_threshold() == usual


# --- memory ----------------------------------------------------------------------------------------------------------

MB = 1_000_000
NUMBERS = pa.array(range(MB // 8), pa.int64())
HAS_JEMALLOC = pytest.mark.skipif("jemalloc" not in pa.supported_memory_backends(), reason="this Arrow has no other")


def backend() -> str:
    return str(pa.default_memory_pool().backend_name)


def own_memory() -> int:
    """Bytes of this process that are not shared with files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("ARROW_DEFAULT_MEMORY_POOL", raising=False)
    before = backend()
    assert before != "jemalloc"
    return before


def fresh_pages() -> int:
    """That it takes to make 100 MB of columns, which are freed again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    columns = [pc.add(NUMBERS, 1) for _ in range(100)]
    del columns
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@HAS_JEMALLOC
def test_what_was_freed_is_used_again(nothing_chosen: str) -> None:
    with freed_memory_kept, ThreadPoolExecutor(1) as pool:  # as in a stage
        pool.submit(fresh_pages).result()  # 25,000, or fewer where an earlier stage has just left some
        assert pool.submit(fresh_pages).result() < 1_000


@pytest.mark.slow
@HAS_JEMALLOC
def test_what_nobody_wants_again_is_given_back_after_a_while(nothing_chosen: str) -> None:
    with freed_memory_kept, ThreadPoolExecutor(1) as pool:
        pool.submit(fresh_pages).result()
    kept, until = own_memory(), time.monotonic() + 60
    while kept - own_memory() < 50 * MB:
        assert time.monotonic() < until
        time.sleep(0.1)


@HAS_JEMALLOC
def test_the_usual_allocator_is_back_when_the_last_one_is_out(nothing_chosen: str) -> None:
    with freed_memory_kept:
        with freed_memory_kept:
            assert backend() == "jemalloc"
        assert backend() == "jemalloc"
    assert backend() == nothing_chosen


@HAS_JEMALLOC
def test_columns_stay_when_their_allocator_is_left(nothing_chosen: str) -> None:
    with freed_memory_kept:
        numbers = pc.add(pa.array(range(MB)), 1)
    assert pc.sum(numbers).as_py() == MB * (MB + 1) // 2


def test_an_allocator_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = backend()
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", before)
    with freed_memory_kept:
        assert backend() == before


def test_an_arrow_without_the_other_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARROW_DEFAULT_MEMORY_POOL", raising=False)
    monkeypatch.setattr(pa, "supported_memory_backends", lambda: ["system"])
    before = backend()
    with freed_memory_kept:
        assert backend() == before


@HAS_JEMALLOC
def test_a_stage_and_a_worker_keep_what_they_free(toys: Any, tmp_path: Path, nothing_chosen: str) -> None:
    within = []
    part = toys.part("a", (1, 2))
    toys.run(tmp_path / "numbers", [part], [("first", 2)], review=lambda *_: within.append(backend()) or {})
    run = PartRun(part, tmp_path, next(part.read(1)).schema, "key")
    (segment,) = segments_of(toys.chain([("without", 2)]))
    run_here(segment, [run], 2, lambda rows: within.append(backend()))
    assert {*within} == {"jemalloc"}
    assert backend() == nothing_chosen


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give back by themselves, or not at all")
def test_what_the_c_library_keeps_can_be_given_back() -> None:
    blocks = [bytes(2_000) for _ in range(50_000)]
    full = own_memory()
    blocks[:-1] = []  # the last one keeps what lies below it from being given back at once
    trim()
    assert full - own_memory() > 80 * MB  # of 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others have no limit that could be set")
def test_any_number_of_threads_allocate_apart(tmp_path: Path) -> None:
    program = f"""
import ctypes, re, threading
from orpo_data.process import threads_allocate_apart
threads_allocate_apart()
library = ctypes.CDLL(None)
library.malloc.restype = library.fopen.restype = ctypes.c_void_p
threads = 8 * {os.cpu_count()} + 8
working = threading.Barrier(threads + 1)
for _ in range(threads):
    threading.Thread(target=lambda: (library.malloc(10_000), working.wait(), working.wait())).start()
working.wait()
file = ctypes.c_void_p(library.fopen(b"{tmp_path / "memory.xml"}", b"w"))
library.malloc_info(0, file)
library.fclose(file)
working.wait()
print(threads, open("{tmp_path / "memory.xml"}").read().count("<heap nr"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    threads, parts = map(int, done.stdout.split())
    assert parts > threads


def test_how_many_parts_of_memory_there_are_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *option: set_to.append(option))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    threads_allocate_apart()
    assert len(set_to) == 1
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    threads_allocate_apart()
    assert len(set_to) == 1


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokenizers_has_no_threads_until_the_last_stage_of_several_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    first, second = ExitStack(), ExitStack()
    first.enter_context(tokenizing_in_own_threads)
    second.enter_context(tokenizing_in_own_threads)
    first.close()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    second.close()
    assert "TOKENIZERS_PARALLELISM" not in os.environ
