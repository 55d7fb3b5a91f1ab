"""The command line in this process, folders compared byte by byte, a tiny model, real raw formats. No network."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from pipelines.recipe import Recipe


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
