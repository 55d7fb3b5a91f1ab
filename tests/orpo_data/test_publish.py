"""Pushing: everything arrives and is sound, the manifest last; others' files are left alone, no secret is told."""

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import orpo_data
from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from orpo_data.places import as_path, send, without_secrets
from orpo_data.publish import push
from orpo_data.targets import PENDING_NAME, FolderTarget, HubTarget, UrlTarget, find_target

EXPORTED = ["parquet/train.parquet", "parquet/eval.parquet", "croissant.json"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def memory() -> Iterator[Callable[[], dict[str, bytes]]]:
    """What lies in fsspec's memory below memory://there."""
    store = MemoryFileSystem.store
    store.clear()
    yield lambda: {name.removeprefix("/there/"): store[name].getvalue() for name in store}
    store.clear()


def check_arrived(found: dict[str, bytes], dataset: Path, tmp_path: Path) -> None:
    """Every file of the dataset as it was but the manifest, the exports, and nothing else; all of it sound."""
    sent = files_of(dataset)
    assert set(found) == {*sent, *EXPORTED}
    assert {name: found[name] for name in sent if name != MANIFEST_NAME} == {
        name: content for name, content in sent.items() if name != MANIFEST_NAME
    }
    copy = tmp_path / "fetched"
    for name, content in found.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert orpo_data.verify(copy).problems == ()
    assert orpo_data.load(copy, "eval").to_list() == orpo_data.load(dataset, "eval").to_list()


# --- a folder --------------------------------------------------------------------------------------------------------


def test_into_a_folder(prepared, tmp_path):
    report = push(prepared / "split", str(tmp_path / "there"))
    check_arrived(files_of(tmp_path / "there"), prepared / "split", tmp_path)
    assert report.target == str(tmp_path / "there")
    assert report.files == {name: len(content) for name, content in files_of(tmp_path / "there").items()}
    assert list(report.files)[-1] == MANIFEST_NAME
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_push_onto_an_earlier_one_leaves_nothing_of_it(prepared, tmp_path):
    push(prepared / "split", str(tmp_path / "there"))
    report = push(prepared / "clean", str(tmp_path / "there"))
    expected = {*files_of(prepared / "clean"), "parquet/train.parquet", "croissant.json"}
    assert set(files_of(tmp_path / "there")) == expected
    assert "eval/data-00000-of-00002.arrow" in report.removed
    assert orpo_data.verify(tmp_path / "there").ok


def test_what_was_pushed_can_be_pushed_again(prepared, tmp_path):
    push(prepared / "split", str(tmp_path / "one"))
    push(tmp_path / "one", str(tmp_path / "two"))
    check_arrived(files_of(tmp_path / "two"), prepared / "split", tmp_path)


def test_a_killed_push_leaves_the_earlier_one(prepared, tmp_path, monkeypatch):
    push(prepared / "split", str(tmp_path / "there"))
    before = files_of(tmp_path / "there")
    copied = []

    def copy(source: Path, target: Path) -> None:
        if len(copied) == 3:
            raise OSError("no space left")
        copied.append(target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(OSError, match="no space left"):
        push(prepared / "clean", str(tmp_path / "there"))
    assert files_of(tmp_path / "there") == before
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_of_someone_else_is_left_alone(prepared, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").write_text("mine")
    with pytest.raises(OrpoError, match="holds something else"):
        push(prepared / "split", str(tmp_path / "there"))
    assert files_of(tmp_path / "there") == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("inside", ["", "/copy"])
def test_not_onto_itself(prepared, inside):
    with pytest.raises(OrpoError, match="is the dataset itself"):
        push(prepared / "split", f"{prepared / 'split'}{inside}")
    with pytest.raises(OrpoError, match="is the dataset itself"):
        push("memory://there", f"memory://there{inside}/")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_damaged_dataset_is_refused(prepared, tmp_path):
    shutil.copytree(prepared / "split", tmp_path / "split")
    (tmp_path / "split" / "report.html").write_text("altered")
    (tmp_path / "split" / "README.md").unlink()
    with pytest.raises(OrpoError, match=r"not pushed, the dataset is damaged: .*README.md: missing \(and 1 more\)"):
        push(tmp_path / "split", str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(OrpoError, match="not a dataset folder"):
        push(tmp_path / "nothing", str(tmp_path / "there"))


@pytest.mark.parametrize("to", ["there", "a/b/c", "", "hf://datasets/me", "nosuch://x/y"])
def test_a_place_that_is_none(prepared, to):
    with pytest.raises(UsageError, match=re.escape(to.removeprefix("hf://")) or "to"):
        push(prepared / "split", to)


@pytest.mark.parametrize(
    ("to", "kind", "url"),
    [
        ("me/data", HubTarget, "/datasets/me/data"),
        ("hf://datasets/me/data", HubTarget, "/datasets/me/data"),
        ("./me/data", FolderTarget, "me/data"),
        ("/me/data", FolderTarget, "/me/data"),
        ("file:///me/data", FolderTarget, "/me/data"),
        ("memory://me/data", UrlTarget, "memory://me/data"),
    ],
)
def test_places(to, kind, url):
    target = find_target(to)
    assert isinstance(target, kind)
    assert target.url.endswith(url)


# --- a URL -----------------------------------------------------------------------------------------------------------


def test_to_a_url(prepared, tmp_path, memory):
    report = push(prepared / "split", "memory://there")
    check_arrived(memory(), prepared / "split", tmp_path)
    assert report.target == "memory://there"


@pytest.mark.parametrize("failing_at", [0, 5, 16])
def test_a_url_never_shows_a_manifest_over_half_a_dataset(prepared, tmp_path, memory, monkeypatch, failing_at):
    push(prepared / "clean", "memory://there")
    sent: list[str] = []

    def put_file(self: Any, local: str, remote: str, **options: Any) -> None:
        if len(sent) == failing_at:
            raise OSError("connection reset by memory://me:secret@there?sig=secret")
        sent.append(remote)
        real(self, local, remote, **options)

    real = MemoryFileSystem.put_file
    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    with pytest.raises(OrpoError, match="push again to finish"):
        push(prepared / "split", "memory://there")
    assert MANIFEST_NAME not in memory()
    monkeypatch.undo()
    push(prepared / "split", "memory://there")
    check_arrived(memory(), prepared / "split", tmp_path)


def test_a_url_where_something_else_lies_is_left_alone(prepared, memory):
    with fsspec.open("memory://there/thesis.tex", "wb") as file:
        file.write(b"mine")
    with pytest.raises(OrpoError, match="holds something else"):
        push(prepared / "split", "memory://there")
    assert memory() == {"thesis.tex": b"mine"}


def test_names_in_a_foreign_manifest_do_not_lead_outside(prepared, tmp_path):
    """What is removed is what a manifest at the target names: it must not name files elsewhere."""
    names = ["../victim", f"{tmp_path}/victim", "train/../../victim", "old.arrow"]
    (tmp_path / "there" / "train").mkdir(parents=True)
    for name in ("victim", "there/old.arrow"):
        (tmp_path / name).write_text("mine")
    document = {"shards": [], "dropped": [], "files": dict.fromkeys(names, "")}
    (tmp_path / "there" / MANIFEST_NAME).write_text(json.dumps(document))
    report = push(prepared / "split", f"local://{tmp_path}/there")
    assert report.removed == ["old.arrow"]
    assert (tmp_path / "victim").read_text() == "mine"
    assert orpo_data.verify(tmp_path / "there").ok


def test_no_secret_is_told(prepared, monkeypatch, capsys):
    def fail(self: Any, *args: Any, **options: Any) -> None:
        raise OSError("cannot reach memory://me:hunter2@there?sig=abc: user me, password hunter2, sig=abc")

    monkeypatch.setattr(MemoryFileSystem, "exists", fail)
    with pytest.raises(OrpoError) as caught:
        push(prepared / "split", "memory://me:hunter2@there?sig=abc")
    assert "hunter2" not in str(caught.value)
    assert "sig=abc" not in str(caught.value)
    assert find_target("memory://me:hunter2@there?sig=abc").url == "memory://there"


def test_secrets_of_the_recipe_stay_here(tmp_path, own_raw_data, make_recipe):
    from pipelines.stages import ingest

    recipe = make_recipe(raw=own_raw_data)
    ingest(recipe.sources[0], recipe, tmp_path / "d")
    address = "https://me:hunter2@host/x.jsonl?sig=abc"
    manifest = read_manifest(tmp_path / "d")
    sources = [{"path": address, "dataset": "hh-rlhf"}]
    steps = [step.model_copy(update={"facts": {"evaluation_sets": [{"path": address}]}}) for step in manifest.steps]
    recipe = manifest.recipe | {"sources": sources}
    write_manifest(tmp_path / "d", manifest.model_copy(update={"recipe": recipe, "steps": steps}))
    push(tmp_path / "d", str(tmp_path / "there"))
    pushed = read_manifest(tmp_path / "there")
    assert pushed.recipe["sources"][0]["path"] == "https://host/x.jsonl"
    assert [step.facts for step in pushed.steps] == [{"evaluation_sets": [{"path": "https://host/x.jsonl"}]}]
    for name, content in files_of(tmp_path / "there").items():
        assert b"hunter2" not in content, name
        assert b"sig=abc" not in content, name


def test_from_a_url(prepared, tmp_path, memory):
    for name in files_of(prepared / "split"):
        send(prepared / "split" / name, as_path(f"memory://there/{name}"))
    push("memory://there/", str(tmp_path / "pushed"))
    check_arrived(files_of(tmp_path / "pushed"), prepared / "split", tmp_path)


def test_a_file_url_is_decoded(prepared, tmp_path):
    push(prepared / "split", (tmp_path / "my folder").as_uri())
    assert [path.name for path in tmp_path.iterdir()] == ["my folder"]


def test_addresses_without_secrets_stay_as_they_are():
    recipe = {"a": ["https://host/x", "s3://b/c", "me/data", 1, None], "b": {"c": "ftp://u@Host:21/x"}}
    assert without_secrets(recipe) == {**recipe, "b": {"c": "ftp://Host:21/x"}}


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of the hub's HTTP interface as a push needs: repositories, trees, files, commits."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[list[tuple[str, str]]] = []  # of each: (what was done, path) in order
        self.refuse = ""
        super().__init__(("127.0.0.1", 0), _HubHandler)


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.server.repos:
                self._answer(409, {"error": "there is one", "url": f"{self._url()}/datasets/{repo}"})
                return
            self.server.repos[repo] = {".gitattributes": b""}
            self.server.private[repo] = asked.get("visibility") == "private"
            self._answer(200, {"url": f"{self._url()}/datasets/{repo}"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer(200, {"files": files})
        elif self.path == "/api/validate-yaml":  # the real hub judges the card's front matter
            self._answer(200, {"errors": [], "warnings": []})
        elif "/commit/" in self.path:
            self._commit(body)

    def _commit(self, body: bytes) -> None:
        if self.server.refuse:
            self._answer(403, {"error": self.server.refuse})
            return
        files, done = self.server.repos[self._repo()], []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            done.append((line["key"], value.get("path", value.get("summary"))))
        self.server.commits.append(done)
        self._answer(
            200,
            {"commitUrl": f"{self._url()}/datasets/{self._repo()}/commit/1", "commitOid": "1" * 40, "success": True},
        )

    def do_GET(self) -> None:
        if "/datasets/" not in self.path:  # what the client asks by the way
            self._answer(404, {})
            return
        files = self.server.repos[self._repo()]
        if "/resolve/" in self.path:
            name = self.path.split("/resolve/main/")[1].split("?")[0]
            self._answer(200, files[name], name)
        else:
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": "1" * 40} for name in files]
            self._answer(200, tree)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _repo(self) -> str:
        found = re.search(r"/datasets/([^/?]+/[^/?]+)", self.path)
        assert found
        return found[1]

    def _answer(self, status: int, content: Any, etag: str = "x") -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{etag}-{len(data)}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with Hub() as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_to_the_hub_in_one_commit(hub, prepared, tmp_path):
    report = push(prepared / "split", "me/data")
    found = hub.repos["me/data"]
    assert found.pop(".gitattributes") == b""
    check_arrived(found, prepared / "split", tmp_path)
    assert hub.private == {"me/data": True}
    assert len(hub.commits) == 1
    assert hub.commits[0][-1] == ("file", MANIFEST_NAME)
    assert report.target.endswith("/datasets/me/data")


def test_a_public_repository_only_when_asked(hub, prepared):
    push(prepared / "split", "me/data", public=True)
    assert hub.private == {"me/data": False}


def test_the_hub_keeps_what_others_added_and_loses_what_is_stale(hub, prepared):
    push(prepared / "split", "me/data")
    hub.repos["me/data"]["notes.md"] = b"mine"
    report = push(prepared / "clean", "me/data")
    kept = {*files_of(prepared / "clean"), "parquet/train.parquet", "croissant.json", ".gitattributes", "notes.md"}
    assert set(hub.repos["me/data"]) == kept
    assert "eval/data-00000-of-00002.arrow" in report.removed
    assert len(hub.commits) == 2


def test_a_repository_of_something_else_is_left_alone(hub, prepared):
    hub.repos["me/data"] = {"model.safetensors": b"mine", "README.md": b"mine"}
    with pytest.raises(OrpoError, match="holds something else"):
        push(prepared / "split", "me/data")
    assert hub.commits == []


def test_a_new_repository_may_have_a_readme(hub, prepared):
    hub.repos["me/data"] = {".gitattributes": b"", "README.md": b"new"}
    push(prepared / "split", "me/data")
    assert hub.repos["me/data"]["README.md"] == (prepared / "split" / "README.md").read_bytes()


def test_the_hub_refuses(hub, prepared):
    hub.refuse = "You don't have the rights to create a commit"
    with pytest.raises(OrpoError, match=r"the hub did not take it .*rights") as caught:
        push(prepared / "split", "me/data")
    assert "hf_secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_marker_of_an_unfinished_push_is_no_part_of_it(prepared, memory):
    push(prepared / "split", "memory://there")
    assert PENDING_NAME not in memory()
