"""Mapped files: their rows stay readable when their memory is given back."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from orpo_data.mapped import let_go, map_stream

TABLE = pa.table({"n": pa.array(range(1_000_000), pa.int64())})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), TABLE.schema) as stream:
        stream.write_table(TABLE)
    return tmp_path / "rows.arrow"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    with pa.ipc.new_stream(str(tmp_path / "small.arrow"), TABLE.schema) as stream:
        stream.write_table(TABLE.slice(0, 3))
    return tmp_path / "small.arrow"


def resident(kind: str) -> int:
    """KiB of this process' memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1])


def test_rows_are_there_after_they_were_let_go(file: Path) -> None:
    table = map_stream(file)
    assert table.equals(TABLE)
    let_go()
    assert table.equals(TABLE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_read_does_not_stay_in_memory(file: Path) -> None:
    table = map_stream(file)
    let_go()
    before = resident("RssFile")
    assert table.equals(TABLE)
    read = resident("RssFile")
    let_go()
    assert read - before > 6_000  # of 8 MB
    assert resident("RssFile") - before < 1_000
    assert table["n"][-1].as_py() == 999_999


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_is_opened_without_staying_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "batches.arrow"
    with pa.ipc.new_stream(str(file), TABLE.schema) as stream:
        stream.write_table(TABLE, max_chunksize=1_000)
    before = resident("RssFile")
    table = map_stream(file)
    assert resident("RssFile") - before < 1_000  # of 8 MB, on every page of which a batch begins nearby
    assert table.equals(TABLE)


def test_a_file_without_a_table_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "broken").write_bytes(b"x" * 100)
    for name in ("empty", "broken", "missing"):
        with pytest.raises((OSError, ValueError)):
            map_stream(tmp_path / name)


def test_a_reader_while_another_thread_lets_go(small: Path) -> None:
    """A file is mapped while the maps of the process are gone through: neither thread is in the other's way."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(lambda: [map_stream(small) for _ in range(1_000)])
            while not reader.done():
                let_go()
            assert sum(map(len, reader.result())) == 3_000
    finally:
        sys.setswitchinterval(interval)
