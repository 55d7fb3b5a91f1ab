"""Checkpoints: complete or absent, plain tensors and JSON, tied to the data and the settings they belong to."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from orpo_data.errors import OrpoError
from orpo_data.shards import file_sha256

MODEL_NAME, OPTIMIZER_NAME, STATE_NAME = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint may only be resumed with."""

    dataset: str  # fingerprint of the tokenized dataset
    config: dict[str, Any]

    def check(self, folder: Path, saved: dict[str, Any]) -> None:
        """OrpoError naming what differs from the run that saved the checkpoint."""
        if saved["dataset"] != self.dataset:
            raise OrpoError(f"{folder}: belongs to dataset {saved['dataset'][:12]}, this one is {self.dataset[:12]}")
        for name, value in self.config.items():
            if (was := saved["config"].get(name)) != value:
                raise OrpoError(f"{folder}: was trained with {name} {was!r}, now it is {value!r}")


def save_checkpoint(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, identity: RunIdentity, keep: int
) -> Path:
    """Write the state after `step` optimizer steps; the folder appears under its name when it is complete."""
    folder = root / f"step-{step:06d}"
    work = root / f".{folder.name}.partial"
    for left_over in (work, folder):
        shutil.rmtree(left_over, ignore_errors=True)
    work.mkdir(parents=True)
    save_model(model, str(work / MODEL_NAME))
    save_file(_optimizer_tensors(optimizer), work / OPTIMIZER_NAME)
    files = {name: file_sha256(work / name) for name in (MODEL_NAME, OPTIMIZER_NAME)}
    state = {"step": step, "dataset": identity.dataset, "config": identity.config, "files": files}
    (work / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")
    work.rename(folder)
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if (folder / STATE_NAME).is_file())


def resume(root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: RunIdentity) -> int:
    """Load the newest checkpoint into model and optimizer: the number of steps it has behind it, 0 without one.

    Raises OrpoError if it belongs to other data or settings, or if its bytes changed.
    """
    checkpoints = list_checkpoints(root)
    if not checkpoints:
        return 0
    folder = checkpoints[-1]
    state = json.loads((folder / STATE_NAME).read_text())
    identity.check(folder, state)
    for name, sha256 in state["files"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise OrpoError(f"{folder / name}: damaged (sha256 differs); delete {folder} to go on from an earlier one")
    load_model(model, str(folder / MODEL_NAME))
    _load_optimizer(optimizer, load_file(folder / OPTIMIZER_NAME))
    return int(state["step"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of each parameter, by the parameter's place in the groups."""
    return {
        f"{index}.{name}": value.contiguous()
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state[parameter].items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # AdamW keeps its step count on the CPU
        optimizer.state[parameter][name] = value if name == "step" else value.to(parameter.device)
