"""Recipe files as plain values: found, read, merged with what they extend, overridden key by key."""

import re
from pathlib import Path
from typing import Any

import yaml

from orpo_data.errors import UsageError
from orpo_data.places import without_secrets

RECIPE_FOLDER = Path(__file__).parent / "recipes"

YAML_ERRORS = (yaml.YAMLError, LookupError, AttributeError, RecursionError)
"""PyYAML's own, and those of Python's that it lets through."""

MOST_VALUES = 100_000
"""Of a document with its aliases written out: a few of them can stand for billions."""


class _Yaml(yaml.SafeLoader):
    """With the booleans of YAML 1.2, true and false alone: in 1.1 the key `on` is one too."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:bool"]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def ready_recipes() -> dict[str, Path]:
    return {file.stem: file for file in sorted(RECIPE_FOLDER.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a ready one."""
    path = Path(recipe)
    if path.is_file():
        return path
    ready = ready_recipes()
    if str(recipe) in ready:
        return ready[str(recipe)]
    raise UsageError(f"no recipe file {str(recipe)!r}, and no ready recipe of that name (there are {', '.join(ready)})")


def read_document(recipe: str | Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's values over those of the recipes it `extends`, a name or a list of which later ones win.

    A name is a file's beside the recipe, without its ending, or a ready recipe's. Mappings are merged key by key, any
    other value takes the place of the extended one's.

    Raises UsageError naming the file that is missing, broken, or extends itself.
    """
    path = find_recipe(recipe)
    if path.resolve() in within:
        raise UsageError(f"{path}: extends itself, by way of {' and '.join(file.name for file in within)}")
    document = _read_yaml(path)
    names = document.pop("extends", [])
    merged: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names if isinstance(names, list) else [None]:
        if not isinstance(name, str):
            raise UsageError(f"{path}: extends: {names!r} is neither a recipe nor a list of recipes")
        beside = path.parent / f"{name}.yaml"
        try:
            base = read_document(beside if beside.is_file() else name, (*within, path.resolve()))
        except UsageError as error:
            raise UsageError(f"{path}: extends: {error}") from None
        merged = merge(merged, base)
    whole: dict[str, Any] = merge(merged, document)
    return whole


def merge(under: Any, over: Any) -> Any:
    """`over`, with what only `under` has where both are mappings."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {key: merge(under[key], value) if key in under else value for key, value in over.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    try:
        document = _plain_values(text)
    except ValueError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys, this is a {type(document).__name__}")
    return document


def _plain_values(text: str) -> Any:
    """What a YAML text says; ValueError where it says nothing, or too much."""
    try:
        values = _Yaml(text).get_single_data()
    except YAML_ERRORS as error:
        raise ValueError(str(error)) from None
    if _count_values(values, {}) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values with its aliases written out")
    return values


def _count_values(value: Any, known: dict[int, int]) -> int:
    """Of a document; without end where a part of it holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES  # until it is counted: only its own parts come by meanwhile
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(value)]


def split_override(override: str) -> tuple[str, Any]:
    """`a.b.0.c=value` as its key and its value, which is read as YAML.

    Raises UsageError, in which the value is not repeated: it may be a secret.
    """
    path, found, text = override.partition("=")
    if not found or not path:
        raise UsageError(f"--set {without_secrets(override)!r}: write key.path=value")
    try:
        return path, _plain_values(text)
    except ValueError:
        raise UsageError(f"--set {path!r}: the value is not valid YAML") from None


def apply_override(document: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in place."""
    path, value = split_override(override)
    *parents, last = path.split(".")
    node: Any = document
    for name in parents:
        node = _child(node, name, path)
    if isinstance(node, list):
        node[_list_index(node, last, path)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UsageError(f"--set {path!r}: {last!r} lies below a plain value")


def _child(node: Any, name: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, name, path)]
    if not isinstance(node, dict):
        raise UsageError(f"--set {path!r}: {name!r} lies below a plain value")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _list_index(node: list[Any], name: str, path: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise UsageError(f"--set {path!r}: {name!r} is no position in a list of {len(node)}")
    return int(name)
