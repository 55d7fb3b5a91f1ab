"""A split read shard by shard: every row once, whatever the number of ranks and of loader workers."""

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st

import orpo_data
from orpo_data.cache import cached
from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, write_dataset: Any, numbers: Any) -> Path:
    """26 rows in 7 shards."""
    folder: Path = tmp_path_factory.mktemp("stream") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orpo_data.writing.ROWS_PER_BATCH", 2)
        patch.setattr("orpo_data.writing.ROWS_PER_SHARD", 4)
        numbers(folder, 26)
    assert len(read_manifest(folder).shards) == 7
    return folder


@pytest.fixture(scope="module")
def numbers(write_dataset: Any) -> Any:
    """Writes so many rows that are told apart by their id."""
    from orpo_data.schema import TOKENIZED

    def write(folder: Path, count: int) -> None:
        nothing = {"prompt_turns_dropped": 0, "chosen_truncated": False, "rejected_truncated": False}
        ids = {"chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3], "prompt_len": 1, "source": "hh"}
        rows = [{"id": f"{i:032d}", **ids, **nothing} for i in range(count)]
        write_dataset(folder, TOKENIZED, {None: rows}, stage="tokenize")

    return write


def rows_of(parts: list[Any]) -> Counter[str]:
    return Counter(row["id"] for part in parts for row in part)


def test_the_rows_of_load_in_their_order(dataset: Path) -> None:
    assert list(orpo_data.stream(dataset)) == orpo_data.load(dataset).to_list()
    assert orpo_data.stream(dataset).features == orpo_data.load(dataset).features


@settings(max_examples=25)
@given(ranks=st.integers(1, 9), workers=st.integers(1, 9))
def test_ranks_and_workers_share_without_overlap_or_loss(dataset: Path, ranks: int, workers: int) -> None:
    """Workers by hand, as a DataLoader's ask for their shards."""
    whole = orpo_data.stream(dataset)
    parts = []
    for rank in range(ranks):
        mine = split_dataset_by_node(whole, rank, ranks)
        number = min(workers, mine.num_shards)
        parts += [mine.shard(number, index) for index in range(number)]
    assert rows_of(parts) == rows_of([orpo_data.load(dataset)])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 3), (2, 2), (7, 2)])
def test_the_processes_of_a_loader(dataset: Path, ranks: int, workers: int) -> None:
    """In a process of its own, as loaders fork: what is forked from one in which a Prefect flow ran exits with 1."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        assert process.submit(loaded, dataset, ranks, workers).result() == rows_of([orpo_data.load(dataset)])


def loaded(dataset: Path, ranks: int, workers: int) -> Counter[str]:
    """The rows that the workers of all ranks' loaders read."""
    from torch.utils.data import DataLoader

    parts = [split_dataset_by_node(orpo_data.stream(dataset), rank, ranks) for rank in range(ranks)]
    return rows_of([DataLoader(part, batch_size=None, num_workers=workers) for part in parts])


def test_a_rank_fetches_its_own_shards_alone(numbers: Any, memory: Path, small_shards: None) -> None:
    numbers(memory / "out", 64)
    manifest = read_manifest(memory / "out")
    assert len(manifest.shards) == 8
    for shard in manifest.shards:
        cached(shard.sha256).unlink()  # as on another machine
    assert sum(1 for _ in split_dataset_by_node(orpo_data.stream(str(memory / "out")), 1, 4)) == 16
    assert sum(cached(shard.sha256).exists() for shard in manifest.shards) == 2


def test_a_shard_that_changed_is_refused(numbers: Any, tmp_path: Path) -> None:
    numbers(tmp_path / "out", 8)
    shard = tmp_path / "out" / read_manifest(tmp_path / "out").shards[0].path
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(OrpoError, match="its bytes changed"):
        list(orpo_data.stream(tmp_path / "out"))
