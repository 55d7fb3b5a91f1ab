"""The command line in this process, folders compared byte by byte, a tiny model, real raw formats. No network."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import yaml

from orpo_train.config import TrainConfig
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from pipelines.training import ModelReport


class Called(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def orpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """The `orpo` command, with its own way of telling errors, without a process of its own."""
    from pipelines.cli import run_app

    def call(*arguments: object) -> Called:
        monkeypatch.setattr("sys.argv", ["orpo", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_app()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Called(code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, str]]:
    """Every path below a folder, with the sha256 of a file's bytes."""

    def take(folder: Path) -> dict[str, str]:
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in sorted(folder.rglob("*"))
        }

    return take


@pytest.fixture
def recipe_file(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> Callable[..., Path]:
    """A recipe over the raw files, as YAML on disk."""

    def write(*overrides: str, raw: Path | None = None) -> Path:
        recipe = make_recipe(*overrides, raw=raw) if raw else make_recipe(*overrides)
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe.resolved()))
        return file

    return write


@pytest.fixture
def own_run(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared run, to be altered."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: Path) -> Path:
    """A random Llama of two layers with the chat tokenizer's vocabulary."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # matrices this small gain nothing from a second one, and wait for it on a busy machine
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_training(tiny_model_dir: Path) -> Callable[..., TrainConfig]:
    """Settings of a few quick steps, with a checkpoint after every second one."""
    least = {
        "model": str(tiny_model_dir),
        "learning_rate": 1e-2,
        "max_steps": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "save_every": 2,
        "precision": "fp32",
    }
    return lambda **settings: TrainConfig.model_validate(least | settings)


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path, tiny_training: Callable[..., TrainConfig]
) -> "ModelReport":
    """One finished training run. Read only."""
    from pipelines.training import train_model

    output = tmp_path_factory.mktemp("trained") / "model"
    return train_model(prepared / "tokenize", tiny_training(), output, job="test")
