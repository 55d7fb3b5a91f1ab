"""The network: an object store that fails, stalls and truncates, downloads that are cut in the middle."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orpo_data import network
from orpo_data.cache import cache_folder
from orpo_data.errors import OrpoError
from orpo_data.sources.files import find_files

ROWS = b"".join(b'{"chosen": "c %d", "rejected": "r"}\n' % i for i in range(2_000))


@pytest.fixture(autouse=True)
def _impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(network, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(network, "STALL", 0.05)


class FaultyStore(MemoryFileSystem):  # type: ignore[misc]
    """An object store where each request goes wrong in one of the ways of `faults`, as they are drawn."""

    protocol = "faulty"
    cachable = False
    faults: ClassVar[Iterator[str]] = iter(())

    def _request(self) -> str:
        fault = next(type(self).faults, "")
        if fault == "fail":
            raise ConnectionResetError("the store hung up")
        if fault == "busy":
            raise TimeoutError("slow down")
        return fault

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("faulty://").strip("/")

    def info(self, path: str, **options: Any) -> Any:
        self._request()
        return super().info(path, **options)

    def find(self, path: str, *args: Any, **options: Any) -> Any:
        self._request()
        return super().find(path, *args, **options)

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        fault, content = self._request(), self.cat_file(rpath)
        with Path(lpath).open("wb") as copy:
            copy.write(content[: len(content) // 2])
            copy.flush()
            if fault == "cut":
                return
            if fault == "drop":
                raise ConnectionAbortedError("gone in the middle")
            if fault == "stall":
                time.sleep(0.3)
            if fault == "slow":
                for start in range(len(content) // 2, len(content), 20_000):
                    time.sleep(0.03)
                    copy.write(content[start : start + 20_000])
                    copy.flush()
                return
            copy.write(content[len(content) // 2 :])


@pytest.fixture
def store() -> Iterator[type[FaultyStore]]:
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    FaultyStore.faults = iter(())
    for name in ("a.jsonl", "b.jsonl"):
        FaultyStore().pipe_file(f"/bucket/{name}", ROWS + name.encode() + b"\n")
    yield FaultyStore
    FaultyStore.store.clear()


FAULTS = ["fail", "busy", "cut", "drop", "stall", "slow"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing(store: type[FaultyStore], fault: str) -> None:
    for place in range(6):
        store.faults = iter(["", *[""] * place, fault])
        files = find_files("faulty:///bucket")
        assert [file.path.read_bytes() for file in files] == [ROWS + name + b"\n" for name in (b"a.jsonl", b"b.jsonl")]
    assert not list((cache_folder() / "scratch").iterdir())


@pytest.mark.parametrize("fault", ["fail", "busy", "cut", "drop", "stall"])
def test_a_fault_that_stays_is_told_in_one_line(store: type[FaultyStore], fault: str) -> None:
    store.faults = iter([""] * 3 + [fault] * 1_000 if fault in ("cut", "drop", "stall") else [fault] * 1_000)
    with pytest.raises(OrpoError, match=r"^faulty:///bucket: cannot be read: [^\n]+$"):
        find_files("faulty:///bucket")
    assert not [*(cache_folder() / "scratch").glob("*")]


@pytest.mark.parametrize("count", [30, pytest.param(1_000, marks=pytest.mark.faults)])
def test_at_random(store: type[FaultyStore], count: int) -> None:
    """The bytes of the store, or one line: never other bytes."""
    draw, refused = random.Random(count), 0
    for _ in range(count):
        store.faults = iter(draw.choices(["", *FAULTS], [12, 3, 3, 3, 3, 1, 1], k=200))
        try:
            files = find_files("faulty:///bucket")
        except OrpoError:
            refused += 1
            continue
        assert [hashlib.sha256(file.path.read_bytes()).hexdigest() for file in files] == [
            hashlib.sha256(ROWS + name + b"\n").hexdigest() for name in (b"a.jsonl", b"b.jsonl")
        ]
    assert refused < count / 2


# --- a server that hangs up -------------------------------------------------------------------------------------------


class Cutting(ThreadingHTTPServer):
    """Serves files, and a dataset repository as the hub does; hangs up in the middle of the first `cuts` answers."""

    commit = "c" * 40

    def __init__(self, files: dict[str, bytes], cuts: int) -> None:
        self.files, self.cuts = files, cuts
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Hanging up is meant."""


class _Handler(BaseHTTPRequestHandler):
    server: Cutting
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/api/datasets/"):
            names = [{"rfilename": name} for name in self.server.files]
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            told: Any = {"id": "me/data", "sha": self.server.commit, "siblings": names}
            self._send(json.dumps(tree if "/tree/" in self.path else told).encode(), "json")
            return
        name = self.path.split("?")[0].rsplit("/", 1)[1]
        if name not in self.server.files:
            self.send_error(404)
            return
        self._send(self.server.files[name], "octet-stream", cut=True)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, content: bytes, kind: str, cut: bool = False) -> None:
        first = 0
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut and self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(content[first : first + (len(content) - first) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(content[first:])

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def cutting() -> Iterator[Callable[..., tuple[Cutting, str]]]:
    servers: list[Cutting] = []

    def start(files: dict[str, bytes], cuts: int) -> tuple[Cutting, str]:
        server = Cutting(files, cuts)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_url_that_is_cut(cutting: Callable[..., tuple[Cutting, str]], name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(network, "STALL", 20.0)
    content = gzip.compress(ROWS, mtime=0) if name.endswith("gz") else ROWS
    _, url = cutting({name: content}, cuts=2)
    (file,) = find_files(f"{url}/{name}")
    assert file.path.read_bytes() == content
    _, url = cutting({name: content}, cuts=1_000)
    with pytest.raises(OrpoError, match=r"cannot be read: Client\w+Error"):
        find_files(f"{url}/{name}")


HUB = """
import sys
from orpo_data.errors import OrpoError
from orpo_data.sources.files import find_files
try:
    for file in find_files("me/data"):
        print(file.name, len(file.path.read_bytes()))
except OrpoError as error:
    print("refused", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("cuts", "whole"), [(0, True), (2, True), (1_000, False)])
def test_a_hub_download_that_is_cut(
    cutting: Callable[..., tuple[Cutting, str]], tmp_path: Path, cuts: int, whole: bool
) -> None:
    """By the hub's own client, with its own endpoint: whole, or one line and nothing that would pass for the file."""
    server, url = cutting({"a.jsonl": ROWS}, cuts)
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    told = hub(environment)
    assert told.startswith(f"a.jsonl {len(ROWS)}" if whole else "refused me/data: nothing here by that name")
    if not whole:
        assert told.count("\n") == 1
        server.cuts = 0
        assert hub(environment) == f"a.jsonl {len(ROWS)}\n"


def hub(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", HUB]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout
