"""Recorded beside the rows, never part of their fingerprint: package versions, git commit, relative places."""

import os
import posixpath
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orpo_data.places import is_local

PACKAGES = (
    "orpo-pipeline",
    "pyarrow",
    "polars",
    "datasets",
    "transformers",
    "tokenizers",
    "torch",
    "accelerate",
    "prefect",
)


@cache
def package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@cache
def git_commit() -> str | None:
    """Commit of the checkout this code runs from, null when installed without one."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def relative_path(folder: Path, start: Path) -> str:
    """`folder` as seen from `start`, so that a run's folder can be moved as a whole; its URL on another storage."""
    if not is_local(folder):
        (scheme, _, path), (other, _, below) = str(folder).partition("://"), str(start).partition("://")
        return posixpath.relpath(path, below) if scheme == other else str(folder)
    if not is_local(start):
        return str(folder.resolve())
    return Path(os.path.relpath(folder.resolve(), start.resolve())).as_posix()
