"""Secrets: planted in addresses and the environment, and looked for in everything that is written or said."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from orpo_data.places import public_url, redacted, without_secrets

USER, PASSWORD, SIGNATURE, TOKEN = "planted-user", "planted-pass%2Fword", "planted-signature", "planted-token"
SECRETS = [USER, PASSWORD, "planted-pass/word", SIGNATURE, TOKEN]
VARIABLES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OPENLINEAGE_API_KEY", "WANDB_API_KEY")


class Server(ThreadingHTTPServer):
    """Gives a file to whoever has the signature."""

    def __init__(self, content: bytes) -> None:
        self.content, self.status = content, 200
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        status = self.server.status if SIGNATURE in self.path else 403
        self.send_response(status)
        self.send_header("Content-Length", str(len(self.server.content) if status == 200 else 0))
        self.end_headers()
        if status == 200 and self.command == "GET":
            self.wfile.write(self.server.content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server(raw_data: Path) -> Iterator[Server]:
    running = Server((raw_data / "hh" / "train.jsonl").read_bytes())
    Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def found_in(root: Path) -> list[str]:
    """Where below a folder a secret stands, in a file or in a name."""
    hits = []
    for path in root.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        hits += [f"{path}: {secret}" for secret in SECRETS if secret.encode() in content or secret in path.name]
    return hits


@pytest.fixture
def hostile_recipe(server: Server, recipe_yaml: Path, tmp_path: Path) -> Path:
    """A recipe whose source is behind an address with a password and a signature."""
    document = yaml.safe_load(recipe_yaml.read_text())
    place = f"{USER}:{PASSWORD}@127.0.0.1:{server.server_port}"
    document["sources"][0]["path"] = f"http://{place}/train.jsonl?sig={SIGNATURE}"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/recipe.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "in/recipe.yaml"


def test_a_run_writes_none_of_them(
    commands: Any, hostile_recipe: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifests, lineage, cards, reports, model folder, logs; and when the server refuses, the error line."""
    out, environment = tmp_path / "out", dict.fromkeys(VARIABLES, TOKEN)
    prepared = commands.run("-v", "prepare", hostile_recipe, "-o", out, environment=environment)
    trained = commands.run("-v", "train", hostile_recipe, "--dataset", out / "tokenize", "-o", out)
    pushed = commands.run("-v", "push", out / "clean", "--to", tmp_path / "pushed", environment=environment)
    shown = commands.run("lineage", out / "tokenize", "--json", environment=environment)
    assert found_in(out) == []
    assert found_in(tmp_path / "pushed") == []
    for child in (prepared, trained, pushed, shown):
        assert [secret for secret in SECRETS if secret in child.printed] == []
    assert json.loads((out / "clean/_manifest.json").read_text())["recipe"]["sources"][0]["path"] == (
        f"http://127.0.0.1:{server.server_port}/train.jsonl"
    )
    for status in (404, 403):
        server.status = status
        failed = commands.start("-v", "prepare", hostile_recipe, "-o", tmp_path / str(status), environment=environment)
        assert failed.wait() == 1
        assert f"http://127.0.0.1:{server.server_port}/train.jsonl: cannot be read" in " ".join(failed.printed.split())
        assert [secret for secret in SECRETS if secret in failed.printed] == []


@pytest.mark.parametrize("command", [["run"], ["compare"], ["serve", "--cron", "0 3 * * *"]])
def test_what_prefect_would_keep_is_refused(
    commands: Any, recipe_yaml: Path, tmp_path: Path, command: list[str]
) -> None:
    """A flow's parameters lie in Prefect's database, readable by whoever sees its pages."""
    place = f"sources.0.path=https://{USER}:{PASSWORD}@host/train.jsonl?sig={SIGNATURE}"
    home = {"PREFECT_HOME": str(tmp_path / "home")}
    refused = commands.start(command[0], recipe_yaml, *command[1:], "--set", place, environment=home)
    assert refused.wait() == 2
    assert "orpo: --set sources.0.path: Prefect would keep the user, password or query" in refused.printed
    assert [secret for secret in SECRETS if secret in refused.printed] == []
    assert found_in(tmp_path) == []


STORE = "from prefect.blocks.system import Secret; Secret(value='planted-token').save('planted')"
FETCH = "from prefect.blocks.system import Secret; print(Secret.load('planted').get())"


@pytest.mark.slow
def test_a_flow_tells_prefect_none_of_them(
    prefect_server: dict[str, str], commands: Any, hostile_recipe: Path, tmp_path: Path
) -> None:
    """Its database and its logs; the token comes out of a block of Prefect's own, which keeps it encrypted, as a
    deployment's `{{ prefect.blocks.secret.NAME }}` puts it into the environment of a run."""
    subprocess.run([sys.executable, "-c", STORE], env=os.environ | prefect_server, check=True)
    fetched = subprocess.run(
        [sys.executable, "-c", FETCH], env=os.environ | prefect_server, check=True, capture_output=True, text=True
    )
    assert fetched.stdout.strip() == TOKEN
    environment = prefect_server | dict.fromkeys(VARIABLES, fetched.stdout.strip())
    ran = commands.run("run", hostile_recipe, "-o", tmp_path / "out", environment=environment)
    assert found_in(tmp_path / "out") == []
    assert found_in(Path(prefect_server["PREFECT_HOME"])) == []
    assert [secret for secret in SECRETS if secret in ran.printed] == []


def test_addresses() -> None:
    url = f"https://{USER}:{PASSWORD}@host.org:8443/a/b.jsonl?sig={SIGNATURE}&x=1#{TOKEN}"
    assert public_url(url) == "https://host.org:8443/a/b.jsonl"
    assert without_secrets({"sources": [{"path": url}, {"path": "me/data"}, {"path": "s3://bucket/key"}]}) == {
        "sources": [{"path": "https://host.org:8443/a/b.jsonl"}, {"path": "me/data"}, {"path": "s3://bucket/key"}]
    }
    told = redacted(f"{url}: 403, message='no', url='{url}'\nplanted-pass/word", url)
    assert [secret for secret in SECRETS if secret in told] == []
    assert "\n" not in told
