"""Recipes over recipes: what `extends` merges, and what the paper's recipes come to."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.chat import CONTROL_TOKENS
from orpo_data.errors import UsageError
from pipelines.documents import RECIPE_FOLDER, apply_override, merge, read_document, ready_recipes
from pipelines.recipe import Recipe

documents = st.recursive(
    st.none() | st.integers() | st.lists(st.integers(), max_size=2),
    lambda values: st.dictionaries(st.sampled_from("abc"), values, max_size=3),
    max_leaves=8,
)
plain = st.none() | st.integers() | st.lists(st.integers(), max_size=2)
sections = st.recursive(  # a key is always a section's or never
    st.dictionaries(st.sampled_from("abc"), plain, max_size=3),
    lambda inner: st.builds(dict.__or__, inner, st.dictionaries(st.sampled_from("xyz"), inner, max_size=3)),
    max_leaves=8,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def file(stem: str, **content: Any) -> Path:
        path = tmp_path / f"{stem}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        return path

    return file


@given(under=documents, over=documents)
def test_an_own_value_wins_and_nothing_else_is_lost(under, over):
    """By hand: {a: {x: 1, y: 2}} under {a: {y: 3}} is {a: {x: 1, y: 3}}."""
    merged = merge(under, over)
    if not (isinstance(under, dict) and isinstance(over, dict)):
        assert merged == over
        return
    assert merged.keys() == under.keys() | over.keys()
    for key, value in merged.items():
        assert value == (merge(under[key], over[key]) if key in under and key in over else (under | over)[key])


@given(first=sections, second=sections, third=sections)
def test_it_does_not_matter_which_of_three_are_merged_first(first, second, third):
    assert merge(merge(first, second), third) == merge(first, merge(second, third))


def test_files_beside_come_before_ready_recipes_and_later_ones_win(write):
    write("hh-rlhf", name="mine", train={"model": "a", "lambda": 1.0})
    write("more/part", train={"lambda": 2.0, "epochs": 3}, sources=[1])
    top = write("top", extends=["hh-rlhf", "more/part"], train={"epochs": 4}, sources=[2])
    assert read_document(top) == {"name": "mine", "train": {"model": "a", "lambda": 2.0, "epochs": 4}, "sources": [2]}


def test_a_ready_recipe_can_be_extended(write):
    recipe = Recipe.read(write("mine", extends="hh-rlhf", name="mine", train={"lambda": 0.25}))
    ready = Recipe.read("hh-rlhf")
    assert recipe.train == ready.train.model_copy(update={"lambda_": 0.25})
    assert recipe.sources == ready.sources


@pytest.mark.parametrize(
    ("extends", "says"),
    [
        ("top", r"extends: .*top\.yaml: extends itself, by way of top\.yaml"),
        ("round", r"extends: .*extends itself, by way of top\.yaml and round\.yaml"),
        ("nowhere", r"top\.yaml: extends: no recipe file 'nowhere'"),
        (7, r"top\.yaml: extends: 7 is neither a recipe nor a list of recipes"),
        ([None], r"top\.yaml: extends: \[None\] is neither"),
        ("broken", r"top\.yaml: extends: .*broken\.yaml: not valid YAML"),
    ],
)
def test_what_cannot_be_extended_is_one_line(write, tmp_path, extends, says):
    write("round", extends="top")
    (tmp_path / "broken.yaml").write_text("name: [unclosed")
    with pytest.raises(UsageError, match=says) as caught:
        Recipe.read(write("top", extends=extends))
    assert "\n" not in str(caught.value)


BOMB = "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvw"))


@pytest.mark.parametrize(
    "text",
    ["[" * 5_000, "2024-13-45", "!!int ''", "!!timestamp x", "!!bool x", "0b_", "a: &a [*a]", "&a {a: *a}", BOMB],
)
def test_what_yaml_makes_nothing_of_is_one_line(tmp_path, text):
    (tmp_path / "top.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"top\.yaml: not valid YAML") as caught:
        read_document(tmp_path / "top.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"--set 'x\.y': the value is not valid YAML"):
        apply_override({}, f"x.y={text}")


def test_booleans_are_true_and_false_alone(tmp_path):
    (tmp_path / "r.yaml").write_text("dedup: {on: prompt, exact: true}\nclean: {ties: off, too_long: no}\n")
    document = read_document(tmp_path / "r.yaml")
    assert document == {"dedup": {"on": "prompt", "exact": True}, "clean": {"ties": "off", "too_long": "no"}}


def test_aliases_are_written_out(tmp_path):
    (tmp_path / "top.yaml").write_text("a: &a {b: 1}\nc: [*a, *a]\nd: {<<: *a, e: 2}")
    assert read_document(tmp_path / "top.yaml") == {"a": {"b": 1}, "c": [{"b": 1}] * 2, "d": {"b": 1, "e": 2}}


@pytest.mark.parametrize("override", ["a.9.b=planted", "a.x=planted", "b.c.d=planted", "a.b=[planted", "=planted"])
def test_what_cannot_be_set_is_one_line_without_the_value(override):
    with pytest.raises(UsageError, match="--set '") as caught:
        apply_override({"a": [1], "b": {"c": "plain"}}, override)
    assert "planted" not in str(caught.value).removeprefix("--set '=planted'")


# --- the paper's recipes ---------------------------------------------------------------------------------------------

PAPER = sorted(name for name in ready_recipes() if re.match("opt|phi|llama|mistral", name))
LAMBDAS = {"opt": 1.0, "phi": 0.25, "llama": 0.2, "mistral": 0.1}  # paper, section 6.1; args.py for OPT


def test_every_model_and_dataset_of_the_paper_has_its_recipe():
    opt = {f"opt-{size}-{data}" for size in ("125m", "350m", "1.3b") for data in ("hh-rlhf", "ultrafeedback")}
    larger = {"phi-2-ultrafeedback", "llama-2-7b-ultrafeedback", "mistral-7b-alpha", "mistral-7b-beta"}
    assert set(PAPER) == opt | larger | {f"{name}-lora" for name in larger}


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_has_its_figures(name):
    recipe = Recipe.read(name)
    assert recipe.train is not None
    family = name.split("-")[0]
    assert recipe.train.lambda_ == LAMBDAS[family]
    assert recipe.train.learning_rate == (5e-6 if family == "mistral" else 8e-6)
    assert recipe.train.epochs == (5 if family == "mistral" else 10)
    assert recipe.tokenize.max_length == (1024 if name.endswith("hh-rlhf") else 2048)
    assert recipe.train.model == recipe.tokenize.tokenizer
    assert (recipe.train.lora is not None) == name.endswith("-lora")
    # base models know no control tokens, so the template has to be plain text
    assert recipe.tokenize.chat_template in {"hh", "zephyr"} - CONTROL_TOKENS.keys()
    # a pair of two full sequences fits into a forward pass
    assert recipe.train.micro_batch_tokens >= 2 * recipe.tokenize.max_length


def test_every_figure_of_the_paper_has_its_source_behind_it():
    files = [*(RECIPE_FOLDER / "paper").glob("*.yaml"), *(ready_recipes()[name] for name in PAPER)]
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines()]
    figures = [(name, line) for name, line in lines if re.match(r"[^#]*(: [\d.]|\[[a-z_, 0-9]*_proj)", line)]
    assert len(figures) > 20
    assert [(name, line) for name, line in figures if " # " not in line and "extends" not in line] == []


def test_no_two_recipes_share_most_of_their_lines():
    """A setting that two recipes have in common stands once, in what both extend."""
    contents = {
        name: [line for line in ready_recipes()[name].read_text().splitlines() if not line.startswith("#")]
        for name in PAPER
    }
    assert max(map(len, contents.values())) <= 8
