"""Imports point one way, and a light call stays light."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after `statement`."""
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("statement", "never"),
    [
        (
            "import orpo_data, pipelines",
            {"pyarrow", "polars", "datasets", "transformers", "torch", "prefect", "pydantic"},
        ),
        ("import orpo_data.stage, orpo_data.history, orpo_data.steps.parse", {"torch", "prefect", "accelerate"}),
        ("import pipelines.recipe", {"torch", "prefect", "accelerate", "datasets"}),
        ("import pipelines.stages, pipelines.preparation", {"torch", "prefect", "accelerate", "datasets"}),
    ],
)
def test_what_an_import_does_not_load(statement: str, never: set[str]) -> None:
    assert loaded_by(statement) & never == set()


def test_the_contracts_of_import_linter() -> None:
    """flows -> pipelines -> orpo_train -> orpo_data, as pyproject.toml says."""
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout
