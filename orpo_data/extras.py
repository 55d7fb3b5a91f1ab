"""Packages that only some settings need: they come with an extra of this project."""

from importlib.util import find_spec

from orpo_data.errors import UsageError


def require_package(package: str, extra: str, key: str) -> None:
    """UsageError unless `package` is installed, which the recipe's `key` needs."""
    if find_spec(package) is None:
        raise UsageError(f"{key}: needs the package {package}: pip install 'orpo-pipeline[{extra}]'")
