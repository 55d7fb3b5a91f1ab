"""Rot: whatever happens to a byte or a file, it is noticed before a wrong row or weight is used."""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import orpo_data
from orpo_data.errors import OrpoError
from orpo_data.export import export
from orpo_data.manifest import read_manifest
from orpo_data.shards import read_table
from orpo_train.checkpoint import RunIdentity, list_checkpoints, load_best, resume, save_best, save_checkpoint
from pipelines.checks import check_shards
from pipelines.training import check_model, train_model

if TYPE_CHECKING:
    from pipelines.training import ModelReport

DATASETS = ["ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"]
IDENTITY = RunIdentity("d" * 64, {"seed": 1})


@contextmanager
def damaged(folder: Path, draw: random.Random) -> Iterator[str]:
    """One file of the folder flipped in a bit, cut short, deleted, or swapped with another; whole again afterwards."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = draw.choice(files)
    name, before = file.relative_to(folder).as_posix(), file.read_bytes()
    kinds = ["flip", "cut", "delete", "swap"] if before else ["delete", "swap"]
    kind = draw.choice(kinds)
    other = draw.choice([path for path in files if path.read_bytes() != before])
    others = other.read_bytes()
    if kind == "flip":
        at = draw.randrange(len(before))
        file.write_bytes(before[:at] + bytes([before[at] ^ 1 << draw.randrange(8)]) + before[at + 1 :])
    elif kind == "cut":
        file.write_bytes(before[: draw.randrange(len(before))])
    elif kind == "delete":
        file.unlink()
    else:
        file.write_bytes(others)
        other.write_bytes(before)
    try:
        yield f"{kind} {name}" + (f" with {other.relative_to(folder)}" if kind == "swap" else "")
    finally:
        file.write_bytes(before)
        other.write_bytes(others)


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, or the one line in which it refuses."""
    try:
        return call(), ""
    except OrpoError as error:
        line = str(error)
    assert line
    assert "\n" not in line
    return None, line


def refused_or_same(what: str, call: Callable[[], Any], expected: Any) -> bool:
    """Whether a loader refuses in one line; else what it loads is what was written."""
    found, refusal = attempt(call)
    if refusal:
        return True
    assert found == expected, f"{what}: other rows were loaded"
    return False


@pytest.fixture
def own_run(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared run, to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))


COUNTS = [40, pytest.param(1_000, marks=pytest.mark.faults)]


@pytest.mark.parametrize("count", COUNTS)
def test_a_dataset_folder(own_run: Path, tmp_path: Path, count: int) -> None:
    """`verify` notices all of it; every loader, whatever concerns the rows that it loads."""
    draw = random.Random(count)
    loaders: dict[str, dict[str, Callable[[], Any]]] = {}
    for stage in DATASETS:
        folder = own_run / stage
        splits = read_manifest(folder).splits or ["train"]
        loaders[stage] = {
            "table": lambda folder=folder: read_table(folder).to_pylist(),
            "dropped": lambda folder=folder: read_table(folder, "dropped").to_pylist(),
            "scan": lambda folder=folder: orpo_data.scan(folder).collect().to_dicts(),
            **{
                f"load {split}": lambda folder=folder, split=split: orpo_data.load(folder, split).to_list()
                for split in splits
            },
        }
        if stage in ("clean", "split"):
            loaders[stage]["export"] = lambda folder=folder: [
                file.path.read_text() for file in export(folder, "trl", tmp_path / "exported")
            ]
            loaders[stage]["push"] = lambda folder=folder: len(orpo_data.push(folder, str(tmp_path / "pushed")).files)
        if stage == "tokenize":
            loaders[stage]["train"] = lambda folder=folder: check_shards(folder, read_manifest(folder))

    sound = {(stage, name): call() for stage, calls in loaders.items() for name, call in calls.items()}
    refused = 0
    for _ in range(count):
        stage = draw.choice(DATASETS)
        with damaged(own_run / stage, draw) as what:
            assert not orpo_data.verify(own_run / stage).ok, f"{stage}: {what} was not noticed"
            names = draw.sample(sorted(loaders[stage]), 2) if count > 100 else sorted(loaders[stage])
            refusals = [refused_or_same(f"{what}: {n}", loaders[stage][n], sound[stage, n]) for n in names]
            refused += any(refusals)
            assert refusals[names.index("push")] if "push" in names else True, what
        assert orpo_data.verify(own_run / stage).ok
    assert refused > count / 4  # most of the bytes are rows


@pytest.mark.parametrize("count", COUNTS)
def test_a_checkpoint(tmp_path: Path, count: int) -> None:
    """A run goes on from the very state that was saved, an earlier one, or not at all."""
    root, draw = tmp_path / "checkpoints", random.Random(count)
    model, optimizer = _fresh()
    states: dict[int, list[torch.Tensor]] = {0: _state(model, optimizer)}
    for step in (2, 4):
        for _ in range(2):
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
        save_checkpoint(root, step, model, optimizer, IDENTITY, writes=True, metrics=[{"step": step, "eval/loss": 0.5}])
        states[step] = _state(model, optimizer)
    save_best(root, 4, model, IDENTITY, writes=True)
    refused = 0
    for _ in range(count):
        with damaged(root, draw) as what:
            fresh = _fresh()
            step, refusal = attempt(lambda fresh=fresh: resume(root, *fresh, IDENTITY))
            refused += bool(refusal)
            assert len(list_checkpoints(root)) == 2 or "state.json" in what
            assert all(map(torch.equal, _state(*fresh), states[step or 0])), f"{what} was used"
            best, refusal = attempt(lambda: load_best(root, 4, IDENTITY)["weight"])
            assert bool(refusal) == ("best-" in what), f"{what} was not noticed"
            assert refusal or torch.equal(best, model.weight), what
    assert refused > count / 4


def _fresh() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _state(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    return [value.detach().clone() for value in (*model.parameters(), *moments)]


@pytest.mark.parametrize("count", COUNTS)
def test_a_model_folder(trained: "ModelReport", tmp_path: Path, count: int) -> None:
    """What is evaluated, or trained further, is what training wrote; only the card may be edited."""
    folder, draw = Path(shutil.copytree(trained.path, tmp_path / "model")), random.Random(count)
    for _ in range(count):
        with damaged(folder, draw) as what:
            assert not orpo_data.verify(folder).ok, f"{what} was not noticed"
            foreign = what == "delete _manifest.json"  # nothing to compare with: as any model from elsewhere
            if not foreign and what.split()[1:] != ["README.md"]:
                with pytest.raises(OrpoError):
                    check_model(folder)
        check_model(folder)


def test_every_reader_asks(trained: "ModelReport", prepared: Path, own_run: Path, tiny_training: Callable[..., Any]):
    """Evaluation, further training and an unchanged run refuse a damaged model; training refuses damaged rows."""
    from pipelines.evaluation import evaluate_model

    folder = Path(shutil.copytree(trained.path, own_run / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(OrpoError, match=r"model\.safetensors: its bytes changed"):
        evaluate_model(folder, prepared / "tokenize", own_run / "evaluate")
    with pytest.raises(OrpoError, match=r"model\.safetensors: its bytes changed"):
        train_model(prepared / "tokenize", tiny_training(model=str(folder)), own_run / "second", job="test")
    shard = next((own_run / "tokenize/train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(OrpoError, match=r"arrow: its bytes changed"):
        train_model(own_run / "tokenize", tiny_training(), own_run / "third", job="test")
    assert not (own_run / "evaluate").exists()
    assert not (own_run / "third").exists()
