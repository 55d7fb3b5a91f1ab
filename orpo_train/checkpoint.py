"""Checkpoints: complete or absent, plain tensors and JSON, tied to the data and the settings they belong to.

A checkpoint holds the weights that are trained and the state of their optimizer. Tensors that lie in pieces on several
processes are written whole, so a run may go on with another number of processes.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from orpo_data.errors import OrpoError
from orpo_data.manifest import digest
from orpo_data.places import file_sha256
from orpo_train import zero

log = logging.getLogger(__name__)

MODEL_NAME, OPTIMIZER_NAME, STATE_NAME = "model.safetensors", "optimizer.safetensors", "state.json"
METRICS_NAME = "metrics.jsonl"
STEP, BEST = "step", "best"

Metrics = dict[str, Any]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint may only be resumed with."""

    dataset: str  # fingerprint of the tokenized dataset
    config: dict[str, Any]
    any_dataset: bool = False  # the user said so

    def check(self, folder: Path, saved: dict[str, Any]) -> None:
        """OrpoError naming what differs from the run that saved the checkpoint."""
        if saved["dataset"] != self.dataset:
            differs = f"{folder}: belongs to dataset {saved['dataset'][:12]}, this one is {self.dataset[:12]}"
            if not self.any_dataset:
                raise OrpoError(f"{differs}; set train.resume_other_dataset to go on all the same")
            log.warning("%s; going on all the same", differs)
        for name, value in self.config.items():
            if (was := saved["config"].get(name)) != value:
                raise OrpoError(f"{folder}: was trained with {name} {was!r}, now it is {value!r}")


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, whole and on the CPU. Every process must call it."""
    return {name: _whole(weight) for name, weight in model.named_parameters() if weight.requires_grad}


def set_weights(model: nn.Module, weights: dict[str, Tensor], origin: Path) -> None:
    """Put the tensors of `trained_weights` back; OrpoError if they are another model's."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if differing := sorted(trained.keys() ^ weights.keys()):
        raise OrpoError(f"{origin}: belongs to another model ({differing[0]} is on one side only)")
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(_placed_like(weight, weights[name]))


def save_checkpoint(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: RunIdentity,
    *,
    writes: bool,
    metrics: Sequence[Metrics] = (),
) -> None:
    """Write the state after `step` optimizer steps. Every process must call it, the one that `writes` writes.

    `metrics` are the lines so far: which weights are the best must not hang on a file that nobody checks.
    """
    weights, moments = trained_weights(model), _optimizer_tensors(optimizer)
    if writes:
        _write(root, f"{STEP}-{step:06d}", {MODEL_NAME: weights, OPTIMIZER_NAME: moments}, step, identity, metrics)


def save_best(root: Path, step: int, model: nn.Module, identity: RunIdentity, *, writes: bool) -> None:
    """Write the weights alone, as those of the best evaluation so far. Every process must call it."""
    weights = trained_weights(model)
    if writes:
        _write(root, f"{BEST}-{step:06d}", {MODEL_NAME: weights}, step, identity)


def _write(
    root: Path,
    name: str,
    files: dict[str, dict[str, Tensor]],
    step: int,
    identity: RunIdentity,
    metrics: Sequence[Metrics] = (),
) -> None:
    """The folder appears under its name when it is complete."""
    folder, work = root / name, root / f".{name}.partial"
    for left_over in (work, folder):
        _remove(left_over)
    work.mkdir(parents=True)
    for file, tensors in files.items():
        save_file(tensors, work / file)
    (work / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    hashes = {file: file_sha256(work / file) for file in (*files, METRICS_NAME)}
    state: dict[str, Any] = {"step": step, "dataset": identity.dataset, "config": identity.config, "files": hashes}
    state["checksum"] = digest(state)
    (work / STATE_NAME).write_text(_text(state), encoding="utf-8")
    work.rename(folder)


def _text(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=2) + "\n"


def prune(root: Path, keep: int, best_steps: set[int | None]) -> None:
    """Keep the latest `keep` checkpoints, and of the best weights those of the given steps."""
    for old in list_checkpoints(root)[:-keep]:
        _remove(old)
    for folder in root.glob(f"{BEST}-*"):
        if _step_of(folder) not in best_steps:
            _remove(folder)


def remove_checkpoints(root: Path) -> None:
    """All of them, the newest last: killed on the way, a run still goes on from that one."""
    for folder in (*root.glob(f"{BEST}-*"), *list_checkpoints(root)):
        _remove(folder)
    shutil.rmtree(root, ignore_errors=True)


def _remove(folder: Path) -> None:
    """The state goes first: what is removed in part is no checkpoint."""
    (folder / STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((folder for folder in root.glob(f"{STEP}-*") if (folder / STATE_NAME).is_file()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def resume(root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: RunIdentity) -> int:
    """Load the newest checkpoint into model and optimizer: the number of steps it has behind it, 0 without one.

    Raises OrpoError if it belongs to another model, other data or settings, or if its bytes changed.
    """
    checkpoints = list_checkpoints(root)
    if not checkpoints:
        return 0
    folder = checkpoints[-1]
    step = _read_state(folder, identity)
    set_weights(model, load_file(folder / MODEL_NAME), folder)
    _load_optimizer(optimizer, load_file(folder / OPTIMIZER_NAME))
    return step


def saved_metrics(root: Path, step: int) -> list[Metrics]:
    """The lines of metrics up to the checkpoint of `step`, which `resume` has checked; none for step 0."""
    file = root / f"{STEP}-{step:06d}" / METRICS_NAME
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if step else []


def load_best(root: Path, step: int, identity: RunIdentity) -> dict[str, Tensor]:
    """The weights of the best evaluation; OrpoError as for `resume`."""
    folder = root / f"{BEST}-{step:06d}"
    _read_state(folder, identity)
    return load_file(folder / MODEL_NAME)


def _read_state(folder: Path, identity: RunIdentity) -> int:
    """The step of a checkpoint whose files are sound and which belongs to this run."""
    try:
        text = (folder / STATE_NAME).read_text(encoding="utf-8")
        state = json.loads(text)
        files, step = dict(state["files"]), int(state["step"])
        sound = text == _text(state) and state.pop("checksum") == digest(state) and folder.name.endswith(f"-{step:06d}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise OrpoError(f"{folder / STATE_NAME}: damaged; delete {folder} to go on from an earlier one")
    identity.check(folder, state)
    for name, sha256 in files.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise OrpoError(f"{folder / name}: damaged (sha256 differs); delete {folder} to go on from an earlier one")
    return step


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU, a tensor that may lie in pieces on several processes."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else zero.whole(tensor)
    return whole.detach().cpu().contiguous()


def _placed_like(target: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor on the device of `target`, or in pieces as that lies."""
    if isinstance(target, DTensor):
        return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    return whole.to(target.device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of each parameter, by the parameter's place in the groups."""
    return {
        f"{index}.{name}": _whole(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state[parameter].items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # AdamW counts its steps in a scalar of its own
        scalar = value.dim() == 0 and parameter.dim() > 0
        optimizer.state[parameter][name] = value.to(parameter.device) if scalar else _placed_like(parameter, value)
