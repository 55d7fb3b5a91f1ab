"""Templates and models are code: what runs, runs in a sandbox with limits, or because somebody said so."""

import ast
import json
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from orpo_data.chat import Chat
from orpo_data.errors import OrpoError, UsageError
from orpo_data.schema import PAIRS
from orpo_data.steps.chat_template import ChatTemplate
from orpo_train.model import load_model
from pipelines.model_card import _remote_code
from pipelines.recipe import Recipe

ROOT = Path(__file__).parents[2]

BOMBS = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a text repeated": "{% set x = 'a' * 10000000000 %}",
    "a list repeated": "{% set x = [0] * 10000000000 %}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x * 9 %}{% endfor %}",
    "a power": "{{ 9 ** 999999999 }}",
    "a wide format": "{{ '%999999999d' % 1 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long output": "{% for i in range(99999) %}{{ messages[0]['content'] * 99 }}{% endfor %}",
}
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch MARK') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "attr": "{{ ''|attr('__class__') }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "messages": "{{ messages.append(1) }}",
}
FRAME = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def own(folder: Path, tokenizer: Path, text: str) -> Callable[[], Chat]:
    (folder / "own.jinja").write_text(text)
    return lambda: Chat.load(str(tokenizer), str(folder / "own.jinja"))


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_would_run_for_ever_or_fill_the_memory(
    tmp_path: Path, chat_tokenizer_dir: Path, bomb: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(OrpoError, match=r"tokenize\.chat_template: ") as refusal:
        own(tmp_path, chat_tokenizer_dir, BOMBS[bomb] + FRAME)()
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - begun < 60


CONTENT = "{% set c = messages[0]['content'] %}"
AGAIN = "{% set ns = namespace(x=c) %}{% for i in range(60) %}"
LATER = {
    "letters of letters": "{% for a in c %}{% for b in c %}{% for d in c %}{% endfor %}{% endfor %}{% endfor %}",
    "a sum": AGAIN + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a tilde": AGAIN + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a block": AGAIN + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "lists": "{% set ns = namespace(x=[c]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a replacement": AGAIN + "{% set ns.x = ns.x.replace('o', c) %}{% endfor %}",
    "a filter": AGAIN + "{% set ns.x = ns.x | replace('o', c) %}{% endfor %}",
    "padding": "{{ c.ljust(c | length * 1000000000) }}",
    "centering": "{{ c | center(c | length * 1000000000) }}",
    "joining": "{{ (c * 9999).join(range(99999) | map('string')) }}",
    "formatting": "{{ '{:>{}}'.format(c, 9999999999) }}",
    "formatting by a text": "{{ ('{:>' ~ '99999' ~ '99999}').format(c) }}",
    "formatting by a list": "{{ ['%50000' ~ c | length ~ '00d'] | format(1) }}",
    "slices": "{{ c | slice(1000000000) | list | length }}",
    "ranges": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "slow steps": "{% set x = c * 9999 %}{% for i in range(99999) %}{% if x.count('b') %}{% endif %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "never": "{% if false %}{{ 9 ** 999999999 }}{% endif %}",
}
CALCULATED = {"never", "a text repeated", "a list repeated", "a power", "a wide format"}


@pytest.mark.parametrize("bomb", [*LATER, *BOMBS])
def test_a_template_that_waits_for_a_text(
    tmp_path: Path, chat_tokenizer_dir: Path, make_pair: Callable[..., Any], bomb: str
) -> None:
    """It does nothing until a message says so: then that row is dropped. Constants are looked at beforehand."""
    text = CONTENT + "{% if 'boom' in c %}" + (LATER | BOMBS)[bomb] + "{% endif %}" + FRAME
    load = own(tmp_path, chat_tokenizer_dir, text + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    begun = time.thread_time()
    if bomb in CALCULATED:
        with pytest.raises(OrpoError, match="the template calculates with"):
            load()
    else:
        rows = [make_pair("boom " * 30), make_pair("Hello?")]
        out = ChatTemplate(chat=load()).apply(pa.Table.from_pylist(rows, schema=PAIRS))
        assert out.dropped["reason"].to_pylist() == ["refused_by_template"]
        assert out.kept["prompt_text"].to_pylist() == ["<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"]
    assert time.thread_time() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # kilobytes


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(
    tmp_path: Path, chat_tokenizer_dir: Path, escape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load = own(tmp_path, chat_tokenizer_dir, ESCAPES[escape] + FRAME)
    try:
        chat = load()
    except OrpoError:
        pass
    else:
        written = chat.render_prompt([{"role": "user", "content": "Hi"}])
        assert "class" not in written
        assert "root:" not in written
    assert not (tmp_path / "MARK").exists()


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("MARK"),))


def test_a_pickle_is_not_opened(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(OrpoError, match="is a pickle, which can run code"):
            load_model(tmp_path)
    assert not (tmp_path / "MARK").exists()


REMOTE = """
from pathlib import Path
Path("MARK").touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
"""


def test_a_models_own_code_runs_only_by_the_flag(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(REMOTE)
    with pytest.raises(OrpoError):
        load_model(folder)
    assert not (tmp_path / "MARK").exists()


def test_the_flag_is_on_record(tiny_training: Callable[..., Any]) -> None:
    """In the manifest, whose recipe and key hold every setting, and in the card's text."""
    config = tiny_training(trust_remote_code=True).model_dump(mode="json", by_alias=True)
    assert config["trust_remote_code"] is True
    assert "own code ran" in _remote_code(config)
    assert _remote_code(config | {"trust_remote_code": False}) == ""


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system ['touch MARK']", "!!python/name:os.system", "!!python/module:os"]
)
def test_yaml_makes_plain_values_only(
    tmp_path: Path, make_recipe: Callable[..., Recipe], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = make_recipe().resolved()
    (tmp_path / "recipe.yaml").write_text(f"{yaml.safe_dump(document)}\ndrift: {value}\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        Recipe.read(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="not valid YAML"):
        make_recipe(f"name={value}")
    assert not (tmp_path / "MARK").exists()


FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"}
FORBIDDEN |= {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "joblib.load"}
UNSAFE_LOADERS = {"yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader"}


def test_nothing_in_the_packages_runs_text_or_a_shell() -> None:
    """Every call in every file, by name; a subprocess takes a list, never a shell, and YAML a safe loader."""
    seen = 0
    for package in ("orpo_data", "orpo_train", "pipelines", "flows"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) not in UNSAFE_LOADERS, f"{file}:{node.lineno}"
                if isinstance(node, ast.Call):
                    seen += 1
                    assert ast.unparse(node.func) not in FORBIDDEN, f"{file}:{node.lineno}"
                    assert not any(word.arg == "shell" for word in node.keywords), f"{file}:{node.lineno}"
    assert seen > 5_000
