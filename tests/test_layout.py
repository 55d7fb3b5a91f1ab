"""The repository's top level is the house of the README, and nothing more."""

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TOP_LEVEL = {
    *("orpo_data", "orpo_train", "pipelines", "flows", "tests", "benchmarks"),
    *("README.md", "LICENSE", "pyproject.toml", "constraints.txt", "Makefile", "prefect.yaml"),
}
NEEDED = {
    "orpo_data",
    "orpo_train",
    "pipelines",
    "flows",
    "tests",
    "README.md",
    "LICENSE",
    "pyproject.toml",
    "Makefile",
}


def tracked() -> list[str]:
    result = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        pytest.skip("not a git checkout")
    return result.stdout.splitlines()


def test_the_top_level() -> None:
    entries = {path.split("/")[0] for path in tracked()}
    entries = {entry for entry in entries if not entry.startswith(".")}
    assert entries <= TOP_LEVEL
    assert entries >= NEEDED


def test_tests_mirror_the_packages() -> None:
    """tests/a/b/ tests a/b/, so that one finds the other; tests/faults is about all of them."""
    folders = {
        Path(path).parent.relative_to("tests")
        for path in tracked()
        if path.startswith("tests/") and path.endswith(".py")
    }
    assert all((ROOT / folder).is_dir() for folder in folders - {Path("faults")})


def test_no_package_in_tests() -> None:
    """pytest runs with --import-mode=importlib: an __init__.py there would shadow the packages."""
    assert [path for path in tracked() if path.startswith("tests/") and path.endswith("__init__.py")] == []


def test_every_package_is_installed() -> None:
    """A folder left out of the list in pyproject.toml is missing from the wheel alone, where no other test looks."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    packages = {
        Path(path).parent.as_posix().replace("/", ".")
        for path in tracked()
        if path.startswith(tuple(settings["mypy"]["packages"])) and path.endswith(".py")
    }
    assert set(settings["setuptools"]["packages"]) == packages
