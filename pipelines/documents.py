"""Recipe files as plain values: found, read, merged with what they extend, overridden key by key."""

from pathlib import Path
from typing import Any

import yaml

from orpo_data.errors import UsageError

RECIPE_FOLDER = Path(__file__).parent / "recipes"


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
        document = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys, this is a {type(document).__name__}")
    return document


def apply_override(document: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in place; the value is read as YAML."""
    path, found, text = override.partition("=")
    if not found or not path:
        raise UsageError(f"--set {override!r}: write key.path=value")
    *parents, last = path.split(".")
    node: Any = document
    for name in parents:
        node = _child(node, name, override)
    if isinstance(node, list):
        node[_list_index(node, last, override)] = _yaml_value(text, override)
    elif isinstance(node, dict):
        node[last] = _yaml_value(text, override)
    else:
        raise UsageError(f"--set {override!r}: {last!r} lies below a plain value")


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, name, override)]
    if not isinstance(node, dict):
        raise UsageError(f"--set {override!r}: {name!r} lies below a plain value")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _list_index(node: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise UsageError(f"--set {override!r}: {name!r} is no position in a list of {len(node)}")
    return int(name)


def _yaml_value(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {override!r}: the value is not valid YAML") from None
