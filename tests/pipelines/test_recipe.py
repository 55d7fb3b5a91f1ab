"""Recipes: every key is read, every mistake is one line that names the key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.errors import UsageError
from pipelines.documents import apply_override, find_recipe, ready_recipes
from pipelines.recipe import Recipe

FULL: dict[str, Any] = {
    "name": "full",
    "sources": [
        {
            "dataset": "pairs",
            "path": "data/*.jsonl",
            "name": "mine",
            "revision": "abc",
            "files": "**/train.jsonl",
            "columns": {"prompt": "question"},
            "weight": 0.5,
        },
        {"dataset": "hh-rlhf", "path": "Anthropic/hh-rlhf"},
    ],
    "binarize": {"strategy": "overall-score", "ties": "keep", "seed": 3},
    "clean": {},
    "split": {"eval_fraction": 0.1, "seed": 4},
    "tokenize": {
        "tokenizer": "some/tokenizer",
        "revision": "def",
        "chat_template": "chatml",
        "max_length": 512,
        "max_prompt_length": 128,
        "overlong_prompt": "drop",
        "overlong_response": "drop",
    },
    "train": {
        "model": "some/model",
        "lambda": 0.25,
        "learning_rate": 1e-5,
        "batch_size": 8,
        "trackers": ["tensorboard"],
    },
    "evaluate": {"max_pairs": 10, "samples": 1, "max_new_tokens": 5},
}
LEAST = {
    "name": "least",
    "sources": [{"dataset": "hh-rlhf", "path": "raw"}],
    "tokenize": {"tokenizer": "some/tokenizer"},
}


def with_override(*overrides: str, document: dict[str, Any] = FULL) -> dict[str, Any]:
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(document))
    for override in overrides:
        apply_override(copy, override)
    return copy


def contains(whole: Any, part: Any) -> bool:
    """Whether every value of `part` stands in `whole` at the same place."""
    if isinstance(part, dict):
        return all(name in whole and contains(whole[name], value) for name, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return bool(whole == part)


def problem(*overrides: str, document: dict[str, Any] = FULL) -> str:
    with pytest.raises(UsageError) as caught:
        Recipe.parse(with_override(*overrides, document=document), "my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_key_is_read():
    assert contains(Recipe.parse(FULL).resolved(), FULL)


def test_resolved_recipe_parses_to_itself():
    for document in (FULL, LEAST):
        recipe = Recipe.parse(document)
        assert Recipe.parse(recipe.resolved()) == recipe


def test_least_recipe_has_defaults_and_no_training():
    recipe = Recipe.parse(LEAST)
    assert recipe.train is None
    assert recipe.sources[0].label == "hh-rlhf"
    assert (recipe.tokenize.max_length, recipe.tokenize.max_prompt_length) == (2048, 1792)


def test_source_name_stands_for_the_dataset():
    assert [source.label for source in Recipe.parse(FULL).sources] == ["mine", "hh-rlhf"]


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("tokenise={}", "tokenise", "tokenize"),
        ("sources.0.pth=x", "sources.0.pth", "path"),
        ("train.lamda=0.1", "train.lamda", "lambda"),
        ("split.eval_fracton=0.1", "split.eval_fracton", "eval_fraction"),
        ("binarize.stategy=mean-rating", "binarize.stategy", "strategy"),
        ("tokenize.maxlength=5", "tokenize.maxlength", "max_length"),
        ("evaluate.sample=5", "evaluate.sample", "samples"),
    ],
)
def test_unknown_key_names_the_nearest(override, key, nearest):
    assert problem(override) == f"my.yaml: unknown key {key!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sources.0={dataset: pairs, path: p, columns: {chosn: x}}",
            "sources.0: columns: unknown key 'chosn' for pairs",
        ),
        (
            "sources.0={dataset: ultrafeedback, path: p, diverges: keep-common-prefix}",
            "sources.0: diverges: ultrafeedback",
        ),
        ("binarize={strategy: weighted-aspects}", "binarize: weights: strategy weighted-aspects needs them"),
        ("binarize={ties: keep, min_margin: 1}", "binarize: min_margin: 1 leaves no ties to keep"),
    ],
)
def test_keys_that_do_not_fit_together_are_told_before_anything_runs(override, message):
    assert problem(override).startswith(f"my.yaml: {message}")


def test_unknown_key_without_a_near_one_lists_all():
    assert "there are name, sources, binarize" in problem("zzz=1")


@pytest.mark.parametrize("key", ["name", "sources", "tokenize"])
def test_missing_key_is_named(key):
    document = {name: value for name, value in FULL.items() if name != key}
    assert problem(document=document) == f"my.yaml: {key!r} is missing"


def test_missing_nested_key_is_named():
    assert problem("tokenize={}") == "my.yaml: 'tokenize.tokenizer' is missing"
    assert problem("sources.1={dataset: hh-rlhf}") == "my.yaml: 'sources.1.path' is missing"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("tokenize.max_length=long", "tokenize.max_length", "'long'"),
        ("sources=raw", "sources", "'raw'"),
        ("sources=[]", "sources", "[]"),
        ("sources.0.dataset=shp", "sources.0.dataset", "'shp'"),
        ("sources.0.weight=0", "sources.0.weight", "0"),
        ("sources.0.weight=1.5", "sources.0.weight", "1.5"),
        ("train.learning_rate=-1", "train.learning_rate", "-1"),
        ("split.eval_fraction=2", "split.eval_fraction", "2"),
        ("split=5", "split", "5"),
        ("split.seed=9223372036854775808", "split.seed", "9223372036854775808"),
        ("name=", "name", "None"),
    ],
)
def test_wrong_value_names_key_and_value(override, key, value):
    message = problem(override)
    assert message.startswith(f"my.yaml: {key}: ")
    assert f"(it is {value})" in message


def test_three_problems_at_once_are_one_line():
    message = problem("train.lamda=1", "split.eval_fraction=2", "tokenize.max_length=x")
    assert all(key in message for key in ("train.lamda", "split.eval_fraction", "tokenize.max_length"))


@pytest.mark.parametrize("length", [128, 100])
def test_prompt_must_leave_room_for_an_answer(length):
    message = problem(f"tokenize.max_length={length}")
    assert "max_prompt_length (128)" in message
    assert f"max_length ({length})" in message


def test_source_names_are_distinct():
    assert "'hh-rlhf' stands twice" in problem("sources.0.name=hh-rlhf")


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".", ".."])
def test_source_label_is_always_a_folder_name(name):
    """It becomes a folder of the output, which it must not leave."""
    document = with_override(f"sources.0.name={name!r}")
    if name == "":
        assert Recipe.parse(document).sources[0].label == "pairs"
    else:
        assert "sources.0.name" in problem(document=document)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("name=other", ["name"], "other"),
        ("train.lambda=0.5", ["train", "lambda"], 0.5),
        ("sources.1.weight=0.5", ["sources", 1, "weight"], 0.5),
        ("sources.0.columns.chosen=good", ["sources", 0, "columns", "chosen"], "good"),
        ("tokenize.chat_template=null", ["tokenize", "chat_template"], None),
        ("train.trackers=[wandb]", ["train", "trackers"], ["wandb"]),
        ("sources.0.path=a=b", ["sources", 0, "path"], "a=b"),
        ("sources.1={dataset: pairs, path: p}", ["sources", 1], {"dataset": "pairs", "path": "p"}),
    ],
)
def test_override_sets_the_value_at_its_path(override, path, value):
    node: Any = with_override(override)
    for part in path:
        node = node[part]
    assert node == value


@pytest.mark.parametrize("document", [{}, {"train": None}])
def test_override_makes_the_sections_above_it(document):
    assert with_override("train.model=m", document=document) == {"train": {"model": "m"}}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lambda", "write key.path=value"),
        ("=5", "write key.path=value"),
        ("sources.2.path=x", "'2' is no position in a list of 2"),
        ("sources.first.path=x", "'first' is no position"),
        ("sources.-1.path=x", "'-1' is no position"),
        ("name.first=x", "'first' lies below a plain value"),
        ("name.first.second=x", "'first' lies below a plain value"),
        ("train.trackers=[a", "not valid YAML"),
    ],
)
def test_bad_override_is_named(override, says):
    with pytest.raises(UsageError) as caught:
        with_override(override)
    assert f"--set {override.partition('=')[0] or override!r}: " in str(caught.value)  # the value may be a secret
    assert says in str(caught.value)


@given(
    value=st.none() | st.booleans() | st.integers() | st.text(),
    keys=st.lists(st.from_regex("[a-z]+", fullmatch=True), min_size=1),
)
def test_any_value_can_be_set_anywhere(value, keys):
    document: dict[str, Any] = {}
    apply_override(document, f"{'.'.join(keys)}={yaml.safe_dump(value)}")
    node: Any = document
    for key in keys:
        node = node[key]
    assert node == value


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ready_recipes()))
def test_ready_recipe_resolves(name):
    recipe = Recipe.read(name)
    assert recipe.name == name
    assert recipe.train is not None
    assert Recipe.parse(recipe.resolved()) == recipe


def test_ready_recipes_are_those_of_the_contract():
    names = set(ready_recipes())
    assert {"hh-rlhf", "ultrafeedback", "mixed"} <= names
    for size in ("125m", "350m"):
        assert any(size in name for name in names)


def test_a_file_goes_before_a_ready_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("hh-rlhf") == ready_recipes()["hh-rlhf"]
    Path("hh-rlhf").write_text(yaml.safe_dump(LEAST))
    assert Recipe.read("hh-rlhf").name == "least"


def test_no_such_recipe_names_the_ready_ones():
    with pytest.raises(UsageError, match=r"'nowhere\.yaml'.*there are .*ultrafeedback"):
        Recipe.read("nowhere.yaml")


def test_read_applies_overrides(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(FULL))
    assert Recipe.read(file, ["train.lambda=0.75"]).resolved()["train"]["lambda"] == 0.75


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- a\n- b\n", "a recipe is a mapping of keys, this is a list"),
        (b"", "a recipe is a mapping of keys"),
        (b"name: [unclosed\n", "not valid YAML"),
        (b"name: \xff\xfe\n", "cannot be read"),
        (b"name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"1: one\nname: x\n", "'sources' is missing"),
    ],
)
def test_broken_file_is_named_in_one_line(tmp_path, content, says):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Recipe.read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_address_is_a_clusters(make_recipe):
    with pytest.raises(UsageError, match=r"runner.*address: the local runner has none"):
        make_recipe("runner.address=tcp://host:8786")
    assert make_recipe("runner.kind=ray").runner.address is None


def test_a_cluster_without_its_package(make_recipe, monkeypatch):
    monkeypatch.setattr("orpo_data.extras.find_spec", lambda package: None)
    with pytest.raises(
        UsageError, match=r"runner\.kind: needs the package prefect_dask: pip install 'orpo-pipeline\[dask\]'"
    ):
        make_recipe("runner.kind=dask")
