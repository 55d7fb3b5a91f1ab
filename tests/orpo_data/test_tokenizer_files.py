"""A tokenizer told from its files: fingerprint and class; and a chat that is opened when it is used."""

import json
import pickle
import shutil
import time
from datetime import date
from pathlib import Path
from threading import Event, Thread
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import AutoTokenizer

from orpo_data import tokenizer_files
from orpo_data.chat import Chat, find_template
from orpo_data.errors import OrpoError
from orpo_data.tokenizer_files import model_of, tokenizer_fingerprint, tokenizer_folder
from orpo_data.unopened import UnopenedChat


@pytest.fixture
def folder(tmp_path: Path, chat_tokenizer_dir: Path) -> Path:
    return Path(shutil.copytree(chat_tokenizer_dir, tmp_path / "tokenizer"))


def edit(file: Path, **changes: object) -> None:
    document = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(document | changes))


def test_what_changes_the_ids_changes_the_fingerprint(folder: Path) -> None:
    seen = {tokenizer_fingerprint(folder)}
    changes = [
        lambda: edit(folder / "tokenizer.json", version="2.0"),
        lambda: edit(folder / "tokenizer_config.json", add_bos_token=True),
        lambda: edit(folder / "config.json", model_type="gemma"),
        lambda: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        lambda: (folder / "added_tokens.json").write_text("{}"),
    ]
    for count, change in enumerate(changes, start=2):
        change()
        seen.add(tokenizer_fingerprint(folder))
        assert len(seen) == count


def test_what_does_not_leaves_it(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", model_type="llama")
    before = tokenizer_fingerprint(folder)
    edit(folder / "config.json", hidden_size=8, torch_dtype="float32")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("a model")
    assert tokenizer_fingerprint(folder) == before
    assert tokenizer_fingerprint(Path(shutil.copytree(folder, tmp_path / "elsewhere"))) == before


def test_where_the_template_writes_the_day_it_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or rows of two days would stand in one dataset."""
    found = {}
    for day in (1, 2):
        monkeypatch.setattr(tokenizer_files, "date", Mock(today=lambda day=day: date(2026, 1, day)))
        found[day] = [tokenizer_fingerprint(folder, text) for text in (None, "{{ strftime_now('%d') }}")]
    assert found[1][0] == found[2][0]
    assert found[1][1] != found[2][1]


def test_another_template_stands_in_for_the_tokenizers_own(folder: Path) -> None:
    own = (folder / "chat_template.jinja").read_text()
    assert tokenizer_fingerprint(folder, own) == tokenizer_fingerprint(folder)
    other = tokenizer_fingerprint(folder, find_template("hh"))
    assert other != tokenizer_fingerprint(folder)
    (folder / "chat_template.jinja").unlink()
    assert tokenizer_fingerprint(folder, find_template("hh")) == other
    edit(folder / "tokenizer_config.json", chat_template=own)
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(folder, own)


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2", "mistral", "unheard-of"])
def test_the_same_tokenizer_without_the_models_code(folder: Path, name: str, model: str) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    edit(folder / "config.json", model_type=model)
    assert model_of(str(folder), folder) is not None
    texts = ["What now?  It's 2024.", "a\n\n1.", "é\tx"]
    theirs, ours = AutoTokenizer.from_pretrained(folder), Chat.load(str(folder)).tokenizer
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert [ours(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]


def test_without_a_class_in_its_files_the_model_decides(folder: Path) -> None:
    edit(folder / "config.json", model_type="llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert model_of(str(folder), folder) is None


def test_a_chat_is_opened_when_it_is_used_and_pickled_unopened(folder: Path) -> None:
    chat = UnopenedChat(str(folder))
    assert "tokenizer" not in vars(chat)
    assert chat.fingerprint == tokenizer_fingerprint(folder)
    prompt = [{"role": "user", "content": "Hello"}]
    assert chat.render_prompt(prompt) == Chat.load(str(folder)).render_prompt(prompt)
    again = pickle.loads(pickle.dumps(chat))
    assert "tokenizer" not in vars(again)
    assert again.fingerprint == chat.fingerprint
    assert again.end_of_turn_id == chat.end_of_turn_id


def test_a_process_opens_the_same_tokenizer_once(folder: Path) -> None:
    first, second = UnopenedChat(str(folder)), UnopenedChat(str(folder))
    assert second.tokenizer is first.tokenizer
    edit(folder / "tokenizer_config.json", model_max_length=7)
    changed = UnopenedChat(str(folder))
    assert changed.tokenizer.model_max_length == 7


@pytest.mark.parametrize("asked", ["control_tokens", "turn_labels"])
def test_threads_may_ask_while_another_opens_it(folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """Where `cached_property` has a lock of its own (Python 3.11), the two would wait for each other."""
    opening, asking, load = Event(), Event(), Chat.load

    def slow_load(*arguments: Any) -> Chat:
        opening.set()
        asking.wait()
        time.sleep(0.1)  # by now the other one waits
        return load(*arguments)

    monkeypatch.setattr(Chat, "load", slow_load)
    first, second, found = UnopenedChat(str(folder)), UnopenedChat(str(folder)), list[str]()

    def ask() -> None:
        opening.wait()
        asking.set()
        found.extend(getattr(second, asked))

    threads = [Thread(target=lambda: first.tokenizer, daemon=True), Thread(target=ask, daemon=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    assert found == getattr(load(str(folder)), asked)


def test_a_broken_file_is_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(OrpoError, match=r"tokenizer_config\.json: unreadable"):
        UnopenedChat(str(folder))
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(OrpoError, match=r"tokenizer_config\.json: not a JSON object"):
        UnopenedChat(str(folder))


def test_a_name_that_is_none() -> None:
    with pytest.raises(OrpoError, match=r"^tokenize\.tokenizer: cannot open 'no/such-tokenizer-here': "):
        tokenizer_folder("no/such-tokenizer-here")
