"""The folders that a dataset was made of, found again by their manifests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orpo_data.chain import Node, label, raw_rows, read_chain, read_sound_chain, record_name, title
from orpo_data.errors import OrpoError
from orpo_data.manifest import FORMAT_VERSION, MANIFEST_NAME, Input, Manifest, StepCounts, read_manifest, write_manifest
from orpo_data.provenance import relative_path

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A dataset folder that read the folders `inputs`, or else a raw file, as they are now; it holds no shards."""

    def write(name: str, *inputs: str, content: str = "", at: Path = tmp_path) -> Path:
        folder = at / name
        folder.mkdir(parents=True, exist_ok=True)
        read = [
            Input(
                name=other,
                path=relative_path(at / other, folder),
                fingerprint="",
                content_hash=read_manifest(at / other).content_hash,
            )
            for other in inputs
        ]
        write_manifest(
            folder,
            Manifest(
                format_version=FORMAT_VERSION,
                stage=name.split("/")[0],
                fingerprint="",
                content_hash=content or name,
                key={},
                inputs=read or [Input(name="raw.jsonl", fingerprint="")],
                rows_in=10,
                steps=[],
                shards=[],
                dropped=[],
                files={},
                recipe={},
                seed=None,
                versions={},
                git_commit=None,
            ),
        )
        return folder

    return write


@pytest.fixture
def run(make: Make, tmp_path: Path) -> Path:
    """ingest/a and ingest/b -> binarize -> clean."""
    for name, *inputs in (("ingest/a",), ("ingest/b",), ("binarize", "ingest/a", "ingest/b"), ("clean", "binarize")):
        make(name, *inputs)
    return tmp_path


def names(chain: tuple[Node, ...], run: Path) -> list[str]:
    return [node.path.relative_to(run).as_posix() for node in chain]


def chains_of(folder: Path) -> list[tuple[Node, ...]]:
    return [read(folder, read_manifest(folder)) for read in (read_chain, read_sound_chain)]


def test_a_whole_run_is_one_sound_chain(run: Path) -> None:
    whole, sound = chains_of(run / "clean")
    assert whole == sound
    assert names(whole, run) == ["ingest/a", "ingest/b", "binarize", "clean"]
    assert [node.link for node in whole] == ["../ingest/a", "../ingest/b", "../binarize", ""]
    assert all(node.sound for node in whole)
    assert raw_rows(whole) == 20


def test_one_input_that_changed_is_told_and_not_trusted_nor_are_those_beside_it(make: Make, run: Path) -> None:
    make("ingest/b", content="new")
    whole, sound = chains_of(run / "clean")
    assert {name: node.sound for name, node in zip(names(whole, run), whole, strict=True)} == {
        "ingest/a": True,
        "ingest/b": False,
        "binarize": True,
        "clean": True,
    }
    assert names(sound, run) == ["binarize", "clean"]


def test_what_a_changed_folder_was_made_of_is_not_trusted(make: Make, run: Path) -> None:
    make("binarize", "ingest/a", "ingest/b", content="new")
    whole, sound = chains_of(run / "clean")
    assert names(whole, run) == ["ingest/a", "ingest/b", "binarize", "clean"]
    assert names(sound, run) == ["clean"]


def test_one_input_that_is_gone(run: Path) -> None:
    (run / "ingest/a" / MANIFEST_NAME).unlink()
    whole, sound = chains_of(run / "clean")
    assert names(whole, run) == ["ingest/b", "binarize", "clean"]
    assert names(sound, run) == ["binarize", "clean"]


def test_one_input_whose_manifest_is_damaged(run: Path) -> None:
    (run / "ingest/a" / MANIFEST_NAME).write_text("{}")
    manifest = read_manifest(run / "clean")
    assert names(read_sound_chain(run / "clean", manifest), run) == ["binarize", "clean"]
    with pytest.raises(OrpoError, match=r"ingest/a/_manifest\.json: the manifest was altered"):
        read_chain(run / "clean", manifest)


def test_a_folder_is_sound_only_if_all_its_readers_read_it_so(make: Make, tmp_path: Path) -> None:
    """One reader before it was made anew, one after: it stands once in the chain, and is told of."""
    for order in (["old", "new"], ["new", "old"]):
        at = tmp_path / order[0]
        make("a", at=at)
        make("old", "a", at=at)
        make("a", content="anew", at=at)
        make("new", "a", at=at)
        make("both", *order, at=at)
        whole, _ = chains_of(at / "both")
        assert names(whole, at) == ["a", *order, "both"]
        assert [node.path.name for node in whole if not node.sound] == ["a"]


@pytest.mark.parametrize(
    ("stage", "sources", "said"),
    [
        ("ingest", ["uf", "uf"], "ingest · uf"),
        ("ingest", [], "ingest"),
        ("binarize", ["uf"], "binarize"),  # it reads the others too, and makes nothing of them
        ("clean", [None], "clean"),
    ],
)
def test_only_an_ingest_is_called_after_a_source(make: Make, stage: str, sources: list[str | None], said: str) -> None:
    steps = [StepCounts(step="x", version=1, source=source, config={}) for source in sources]
    manifest = read_manifest(make(stage)).model_copy(update={"steps": steps, "recipe": {"name": "mine"}})
    assert label(manifest) == Node(Path(), manifest).label == said
    assert title(manifest) == f"mine: {said}"


def test_records_are_counted_as_people_do() -> None:
    files = ("a.jsonl", "b/a.jsonl.gz", "a.ndjson", "a.parquet", "a.JSON", "a.json.gz", "a.arrow")
    assert [record_name(file, 0) for file in files] == ["line 1"] * 3 + ["record 1"] * 4
    assert record_name("a.jsonl", 12344) == "line 12345"  # as `orpo lineage --line` takes it


def test_the_chain_of_a_relative_path(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    whole, _ = chains_of(Path("clean"))
    assert [str(node.path) for node in whole] == ["ingest/a", "ingest/b", "binarize", "clean"]


def test_the_chain_of_a_link_to_a_dataset_is_that_of_the_dataset(make: Make, run: Path, tmp_path: Path) -> None:
    """`..` behind a link leads beside what the link names, not beside the link."""
    elsewhere = tmp_path / "elsewhere"
    make("binarize", at=elsewhere)
    (elsewhere / "latest").symlink_to(run / "clean")
    whole, sound = chains_of(elsewhere / "latest")
    assert whole == sound
    assert [node.path.resolve() for node in whole[:-1]] == [run / name for name in ("ingest/a", "ingest/b", "binarize")]
