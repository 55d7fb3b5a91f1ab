"""Full collections come seldom while a stage runs or a tokenizer is opened, and as often as ever afterwards."""

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from orpo_data.chat import Chat
from orpo_data.errors import OrpoError
from orpo_data.garbage import few_full_collections
from orpo_data.parts import PartRun, run_here, segments_of


@pytest.fixture
def usual() -> Iterator[tuple[int, int, int]]:
    """A threshold that is nobody's default."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 7)
    yield gc.get_threshold()
    gc.set_threshold(*before)


def test_the_last_one_out_restores_the_threshold_in_whatever_order_they_leave(usual: tuple[int, int, int]) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(few_full_collections())
    second.enter_context(few_full_collections())
    assert gc.get_threshold()[:2] == usual[:2]
    assert gc.get_threshold()[2] > usual[2]
    first.close()
    assert gc.get_threshold()[2] > usual[2]
    second.close()
    assert gc.get_threshold() == usual


def test_many_threads_go_in_and_out(usual: tuple[int, int, int]) -> None:
    def work(_: int) -> int:
        with few_full_collections():
            return gc.get_threshold()[2]

    with ThreadPoolExecutor(8) as pool:
        assert min(pool.map(work, range(400))) > usual[2]
    assert gc.get_threshold() == usual


def test_young_garbage_is_collected_within(usual: tuple[int, int, int]) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    with few_full_collections():
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
