"""Checkpoints: whole or absent, tied to data and settings; a resumed run is the uninterrupted one, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from orpo_data.errors import OrpoError
from orpo_train import checkpoint, loop
from orpo_train.checkpoint import (
    RunIdentity,
    list_checkpoints,
    load_best,
    prune,
    resume,
    save_best,
    save_checkpoint,
    set_weights,
)
from orpo_train.loop import train
from orpo_train.run import make_optimizer

Make = Callable[..., Any]
ROOT = Path(__file__).parent.parent.parent
IDENTITY = RunIdentity("d" * 64, {"learning_rate": 0.1, "seed": 1})
WEIGHTS, METRICS = "model.safetensors", "metrics.jsonl"


class PowerCutError(Exception):
    """The plug was pulled."""


@pytest.fixture
def run(
    model_folder: Make, make_table: Make, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Eight steps over ten pairs with dropout, a checkpoint every third; with `steps`, interrupted after so many."""

    def start(folder: Path, steps: int | None = None, dataset: str = "d" * 64, **settings: Any) -> Path:
        settings = {"kind": "gpt2-dropout", "eval_every": 2, "save_every": 3, "batch_size": 5} | settings
        config = make_config(model=str(model_folder(settings.pop("kind"))), epochs=4, **settings)
        folder.mkdir(exist_ok=True)
        done = 0

        def counted(*args: Any) -> Any:
            nonlocal done
            if done == steps:
                raise PowerCutError
            done += 1
            return original(*args)

        original = loop.optimizer_step
        with monkeypatch.context() as patch:
            patch.setattr(loop, "optimizer_step", counted)
            train(config, make_table(10), make_table(3, seed=1), folder, dataset)
        return folder

    return start


def _same(a: Path, b: Path) -> None:
    assert (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()
    assert (a / METRICS).read_text() == (b / METRICS).read_text()
    assert (a / "train.json").read_text() == (b / "train.json").read_text()


@pytest.mark.parametrize("kind", ["gpt2-dropout", "opt-dropout", "llama-tied"])
@pytest.mark.parametrize("steps", [2, 3, 5, 7])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, steps: int, run: Make, tmp_path: Path) -> None:
    """PowerCutError before the first checkpoint, right after it, between two, and before the last step."""
    whole = run(tmp_path / "whole", kind=kind)
    with pytest.raises(PowerCutError):
        run(tmp_path / "cut", kind=kind, steps=steps)
    assert [folder.name for folder in list_checkpoints(tmp_path / "cut" / "checkpoints")] == [
        f"step-{step:06d}" for step in (3, 6) if step <= steps
    ]
    torch.manual_seed(steps)  # what ran in between must not matter
    _same(run(tmp_path / "cut", kind=kind), whole)


def test_interrupted_twice(run: Make, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    for steps in (4, 2):
        with pytest.raises(PowerCutError):
            run(tmp_path / "cut", steps=steps)
    _same(run(tmp_path / "cut"), whole)


def test_dropout_is_at_work(run: Make, tmp_path: Path) -> None:
    """Otherwise the tests above would show nothing of random states: all pairs in a batch, only the draws differ."""
    losses = {}
    for kind in ("gpt2-dropout", "gpt2"):
        for seed in (1, 2):
            folder = run(tmp_path / f"{kind}-{seed}", kind=kind, max_steps=1, batch_size=10, seed=seed)
            lines = map(json.loads, (folder / METRICS).read_text().splitlines())
            losses[kind, seed] = next(line["loss"] for line in lines if "loss" in line)
    assert losses["gpt2", 1] == pytest.approx(losses["gpt2", 2], rel=1e-6)
    assert abs(losses["gpt2-dropout", 1] - losses["gpt2-dropout", 2]) > 1e-4


def test_a_finished_run_is_not_trained_again(run: Make, tmp_path: Path) -> None:
    whole = run(tmp_path / "run", save_every=4)
    before = {name: (whole / name).read_bytes() for name in (WEIGHTS, METRICS)}
    run(tmp_path / "run", steps=0, save_every=4)
    assert {name: (whole / name).read_bytes() for name in before} == before


def test_a_torn_line_of_metrics_is_written_again(run: Make, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(PowerCutError):
        run(tmp_path / "cut", steps=5)
    with (tmp_path / "cut" / METRICS).open("a") as file:
        file.write('{"step": 6, "lo')
    _same(run(tmp_path / "cut"), whole)


def test_what_changes_no_weights_may_differ(run: Make, tmp_path: Path) -> None:
    with pytest.raises(PowerCutError):
        run(tmp_path / "run", steps=5)
    run(tmp_path / "run", steps=5, log_every=2, save_every=2, keep_checkpoints=1, micro_batch_size=1, layout="plain")


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 7])
def test_a_resumed_run_exports_the_same_best_weights(steps: int, run: Make, tmp_path: Path) -> None:
    """Also when it was cut after a better evaluation than its newest checkpoint knows of."""
    settings = {"export": "best", "eval_every": 1, "learning_rate": 0.1}
    whole = run(tmp_path / "whole", **settings)
    assert json.loads((whole / "train.json").read_text())["exported_step"] < 8
    with pytest.raises(PowerCutError):
        run(tmp_path / "cut", steps=steps, **settings)
    _same(run(tmp_path / "cut", **settings), whole)


def test_a_run_that_had_stopped_early_stays_stopped(run: Make, tmp_path: Path) -> None:
    settings = {"early_stopping": 1, "eval_every": 1, "save_every": 1, "learning_rate": 0.3}
    whole = run(tmp_path / "run", **settings)
    stopped = json.loads((whole / "train.json").read_text())["steps"]
    assert stopped < 8
    run(tmp_path / "run", steps=0, **settings)
    assert json.loads((whole / "train.json").read_text())["steps"] == stopped


def test_another_dataset_when_told_so(run: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PowerCutError):
        run(tmp_path / "run", steps=5)
    run(tmp_path / "run", dataset="e" * 64, resume_other_dataset=True)
    assert "belongs to dataset dddddddddddd, this one is eeeeeeeeeeee; going on" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "e" * 64}, "belongs to dataset dddddddddddd, this one is eeeeeeeeeeee"),
        ({"learning_rate": 0.5}, r"was trained with learning_rate 0\.01, now it is 0\.5"),
        ({"lambda_": 0.5}, r"was trained with lambda 0\.1, now it is 0\.5"),
        ({"seed": 7}, "was trained with seed 42, now it is 7"),
        ({"max_steps": 4}, "was trained with max_steps None, now it is 4"),
    ],
    ids=["dataset", "learning_rate", "lambda", "seed", "max_steps"],
)
def test_another_run_is_refused(changed: dict[str, Any], message: str, run: Make, tmp_path: Path) -> None:
    with pytest.raises(PowerCutError):
        run(tmp_path / "run", steps=5)
    before = (tmp_path / "run" / METRICS).read_bytes()
    with pytest.raises(OrpoError, match=message):
        run(tmp_path / "run", **changed)
    assert (tmp_path / "run" / METRICS).read_bytes() == before


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(make_model: Make, make_config: Make) -> Callable[[int], tuple[Any, torch.optim.Optimizer]]:
    """A tied model and its optimizer after some steps; after none, as a resumed run builds them."""

    def make(steps: int) -> tuple[Any, torch.optim.Optimizer]:
        model = make_model("llama-tied", seed=steps)
        optimizer = make_optimizer(model, make_config())
        for step in range(steps):
            model(input_ids=torch.tensor([[step, 1, 2]])).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    return make


def _saved(root: Path, step: int, model: Any, optimizer: torch.optim.Optimizer) -> Path:
    save_checkpoint(root, step, model, optimizer, IDENTITY, writes=True, metrics=[{"step": step}])
    return root / f"step-{step:06d}"


def _state(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = sorted(optimizer.state_dict()["state"].items())
    moments = [value for _, state in states for _, value in sorted(state.items())]
    return [*model.state_dict().values(), *moments]


def test_weights_and_moments_come_back(trained: Make, tmp_path: Path) -> None:
    saved, fresh = trained(3), trained(0)
    folder = _saved(tmp_path, 3, *saved)
    assert sorted(path.name for path in folder.iterdir()) == [METRICS, WEIGHTS, "optimizer.safetensors", "state.json"]
    assert resume(tmp_path, *fresh, IDENTITY) == 3
    before, after = _state(*saved), _state(*fresh)
    assert len(before) == len(after)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert fresh[0].get_output_embeddings().weight is fresh[0].get_input_embeddings().weight


def test_without_a_checkpoint_a_run_begins_at_zero(trained: Make, tmp_path: Path) -> None:
    assert resume(tmp_path / "none", *trained(0), IDENTITY) == 0


def test_the_latest_are_kept(trained: Make, tmp_path: Path) -> None:
    for step in (2, 4, 10):
        _saved(tmp_path, step, *trained(1))
        save_best(tmp_path, step, trained(1)[0], IDENTITY, writes=True)
    prune(tmp_path, 2, {2, None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-000002", "step-000004", "step-000010"]


def test_the_newest_is_the_one_of_most_steps(trained: Make, tmp_path: Path) -> None:
    for step in (1_000_000, 999_999):
        _saved(tmp_path, step, *trained(1))
    assert resume(tmp_path, *trained(0), IDENTITY) == 1_000_000


def test_a_half_written_checkpoint_is_none(trained: Make, tmp_path: Path) -> None:
    whole = _saved(tmp_path, 2, *trained(2))
    shutil.copytree(whole, tmp_path / ".step-000004.partial")
    (tmp_path / ".step-000004.partial" / WEIGHTS).write_bytes(b"half")
    shutil.copytree(whole, tmp_path / "step-000006")
    (tmp_path / "step-000006" / "state.json").unlink()  # half removed
    assert resume(tmp_path, *trained(0), IDENTITY) == 2
    for step in (4, 6):
        _saved(tmp_path, step, *trained(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000006"]


@pytest.mark.parametrize("name", [WEIGHTS, METRICS, "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_is_refused_by_name(name: str, damage: str, trained: Make, tmp_path: Path) -> None:
    file = _saved(tmp_path, 2, *trained(2)) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes({"flipped": content, "cut": content[:-9], "gone": b""}[damage])
    if damage == "gone":
        file.unlink()
    fresh = trained(0)
    before = [tensor.clone() for tensor in _state(*fresh)]
    with pytest.raises(OrpoError, match=rf"step-000002/{name}: damaged.*delete .*step-000002 to go on"):
        resume(tmp_path, *fresh, IDENTITY)
    assert all(torch.equal(a, b) for a, b in zip(before, _state(*fresh), strict=True))


@pytest.mark.parametrize("state", ["", "{", "[]", '{"step": 2}', '{"step": "x", "files": {}}'])
def test_a_torn_state_is_refused_by_name(state: str, trained: Make, tmp_path: Path) -> None:
    (_saved(tmp_path, 2, *trained(2)) / "state.json").write_text(state)
    with pytest.raises(OrpoError, match=r"step-000002/state\.json: damaged; delete .*step-000002"):
        resume(tmp_path, *trained(0), IDENTITY)


def test_another_models_checkpoint_is_refused(trained: Make, make_model: Make, tmp_path: Path) -> None:
    _saved(tmp_path, 2, *trained(2))
    other = make_model("gpt2")
    with pytest.raises(OrpoError, match=r"step-000002: belongs to another model \(.* is on one side only\)"):
        resume(tmp_path, other, torch.optim.AdamW(other.parameters()), IDENTITY)


def test_the_best_weights_come_back(trained: Make, tmp_path: Path) -> None:
    (saved, _), (fresh, _) = trained(3), trained(0)
    save_best(tmp_path, 7, saved, IDENTITY, writes=True)
    set_weights(fresh, load_best(tmp_path, 7, IDENTITY), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), fresh.parameters(), strict=True))


WORKER = """
import sys
from pathlib import Path
import pyarrow as pa
import torch
from orpo_train.config import TrainConfig
from orpo_train.loop import train

torch.set_num_threads(1)
folder = Path(sys.argv[1])
table = pa.ipc.open_stream(folder / "train.arrow").read_all()
train(TrainConfig.model_validate_json((folder / "config.json").read_text()), table, None, folder / "cut", "d" * 64)
"""


@pytest.mark.slow
def test_killed_and_run_again(model_folder: Make, make_table: Make, make_config: Make, tmp_path: Path) -> None:
    """A real SIGKILL at some instant after the second checkpoint, another process to go on."""
    config = make_config(model=str(model_folder("opt-dropout")), epochs=40, save_every=2)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "worker.py").write_text(WORKER)
    table = make_table(10)
    with pa.ipc.new_stream(tmp_path / "train.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    train(config, table, None, tmp_path / "whole", "d" * 64)

    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "cut" / "checkpoints" / "step-000004").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it had finished already"
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    subprocess.run(command, env=environment, check=True, timeout=120)
    _same(tmp_path / "cut", tmp_path / "whole")


def test_checkpoints_are_removed_newest_last(trained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any removal, what is left is the newest or nothing."""
    removed: list[str] = []
    for step in (2, 4):
        _saved(tmp_path, step, *trained(step))
    save_best(tmp_path, 4, trained(4)[0], IDENTITY, writes=True)
    original = checkpoint._remove

    def remove(folder: Path) -> None:
        removed.append(folder.name)
        original(folder)
        assert not folder.exists()

    monkeypatch.setattr(checkpoint, "_remove", remove)
    checkpoint.remove_checkpoints(tmp_path)
    assert removed == ["best-000004", "step-000002", "step-000004"]
    assert not tmp_path.exists()
