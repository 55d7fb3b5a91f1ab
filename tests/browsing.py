"""A real browser, and a server on this machine that hears of every request: fixtures for pages."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs the browser without a window; returns what it prints."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs a browser: apt-get install chromium")
    profile = tmp_path_factory.mktemp("browser")

    def run(url: str, *flags: str) -> str:
        fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        result = subprocess.run(
            [chromium, *fixed, *flags, url], capture_output=True, text=True, timeout=120, check=True
        )
        return result.stdout

    return run


@pytest.fixture
def dom(browse: Callable[..., str]) -> Callable[..., str]:
    """The document of a page, after its scripts ran."""
    return lambda url, *flags: browse(url, "--dump-dom", *flags)


class Sentinel(ThreadingHTTPServer):
    """A server on this machine that remembers what it was asked for; its pages come with scripts turned off."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.pages: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Sentinel

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        page = self.server.pages.get(self.path)
        self.send_response(204 if page is None else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", "script-src 'none'")
        self.end_headers()
        self.wfile.write(page or b"")

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def sentinel() -> Iterator[Sentinel]:
    with Sentinel() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
