"""What the README shows can be typed, and what it says was printed is what is printed now."""

import re
import shlex
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml

import orpo_data
from flows.cli import app
from orpo_data.steps.chat_template import ChatTemplate
from orpo_data.steps.clean import Clean
from orpo_data.steps.dedup import Dedup
from orpo_data.steps.parse import Parse
from orpo_data.steps.split import Split
from orpo_data.steps.tokenize import Tokenize
from orpo_data.steps.truncate import Truncate
from pipelines.recipe import Recipe

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (orpo .*)$|`(orpo [^\s`]+ [^\n`]+)`", TEXT, re.MULTILINE)
PRINTED = (ChatTemplate, Clean, Dedup, Parse, Split, Tokenize, Truncate)


@pytest.mark.parametrize("line", [indented or quoted for indented, quoted in COMMANDS])
def test_a_command_has_these_arguments(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    typer.main.get_command(app).commands[name].make_context(name, list(arguments))
    Recipe.read("hh-rlhf", [value for option, value in pairwise(arguments) if option == "--set"])


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 30  # or no test above would have run


def test_recipes_are_valid() -> None:
    whole, comparison = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
    assert Recipe.parse(whole).name == "my-run"
    assert Recipe.parse(whole | comparison).compare


def test_steps_have_the_versions_that_are_shown() -> None:
    shown = dict(re.findall(r"^  (\w+) v(\d+): \d+ in", TEXT, re.MULTILINE))
    assert shown == {step.name: str(step.version) for step in PRINTED}


def test_the_calls_of_other_code_exist() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for module, names in re.findall(r"^from ((?:orpo|pipelines)\S*) import (\w+(?:, \w+)*)", block, re.MULTILINE):
        assert all(callable(getattr(import_module(module), name)) for name in names.split(", "))
    calls = re.findall(r"\borpo_data\.(\w+)\(", block)
    assert len(calls) > 5
    assert all(callable(getattr(orpo_data, name)) for name in calls)
