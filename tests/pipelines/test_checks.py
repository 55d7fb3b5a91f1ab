"""What is refused before a training run starts."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import read_manifest
from pipelines.checks import chat_of, check_inputs, check_shards, check_tokenizer, check_trackers, vocabulary_difference


def tokenizer(ordinary: dict[str, int], control: dict[str, int] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of words; control tokens follow in the order of their ids."""
    vocabulary = ordinary | (control or {})
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))
    made.add_special_tokens({"additional_special_tokens": list(control or {})})
    assert made.get_vocab() == vocabulary
    return made


WORDS = {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("dataset", "model", "difference"),
    [
        (tokenizer(WORDS), tokenizer(WORDS), None),
        (tokenizer(WORDS), tokenizer({"a": 0, "c": 1, "b": 2}), ("b", 1, 2)),
        (tokenizer(WORDS), tokenizer({"a": 0, "b": 1}), ("c", 2, None)),
        (tokenizer(WORDS), tokenizer(WORDS | {"d": 3}), None),
        # a chat template's tokens, new at the end or in the place of reserved ones
        (tokenizer(WORDS, {"<user>": 3}), tokenizer(WORDS), None),
        (tokenizer(WORDS, {"<user>": 3}), tokenizer(WORDS, {"<reserved>": 3}), None),
        # but never in the place of a word, or at another place than the model has them
        (tokenizer(WORDS, {"<user>": 3}), tokenizer(WORDS | {"d": 3}), ("<user>", 3, None)),
        (tokenizer(WORDS, {"<s>": 3, "</s>": 4}), tokenizer(WORDS, {"</s>": 3, "<s>": 4}), ("<s>", 3, 4)),
    ],
)
def test_where_vocabularies_differ(dataset, model, difference):
    assert vocabulary_difference(dataset, model) == difference


def test_the_dataset_own_tokenizer_passes_whatever_its_template(prepared, chat_tokenizer_dir, tmp_path):
    own = chat_of(read_manifest(prepared / "tokenize")).tokenizer
    check_tokenizer(own, chat_tokenizer_dir, "base")
    other = shutil.copytree(chat_tokenizer_dir, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    check_tokenizer(own, other, "base")


def test_another_tokenizer_names_both_and_a_token(prepared, plain_tokenizer_dir, chat_tokenizer_dir):
    own = chat_of(read_manifest(prepared / "tokenize")).tokenizer
    with pytest.raises(OrpoError) as caught:
        check_tokenizer(own, plain_tokenizer_dir, "org/base")
    said = str(caught.value)
    assert said.startswith(f"train.model: the tokenizer of org/base is not {chat_tokenizer_dir}")
    token, of_dataset, _ = vocabulary_difference(own, PreTrainedTokenizerFast.from_pretrained(plain_tokenizer_dir))
    assert f"{token!r} is id {of_dataset} in the dataset" in said


def test_a_model_folder_without_tokenizer_is_not_compared(prepared, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    check_tokenizer(chat_of(read_manifest(prepared / "tokenize")).tokenizer, tmp_path, "base")


def test_a_tokenizer_that_does_not_open_is_told_and_passed_over(prepared, tmp_path, caplog):
    (tmp_path / "tokenizer.json").write_text("{")
    check_tokenizer(chat_of(read_manifest(prepared / "tokenize")).tokenizer, tmp_path, "org/base")
    assert "the tokenizer of org/base cannot be opened, so it is not compared" in caplog.text


def test_a_changed_byte_names_the_file_and_the_command(own_run):
    folder = own_run / "tokenize"
    manifest = read_manifest(folder)
    check_shards(folder, manifest)
    file = folder / next(shard.path for shard in manifest.shards if shard.split == "eval")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(OrpoError) as caught:
        check_shards(folder, manifest)
    assert str(caught.value).startswith(f"{file}: its bytes changed")
    assert f"`orpo verify {folder}`" in str(caught.value)


def test_a_tokenizer_that_is_gone_is_told_before_the_run(own_run, tiny_training, tiny_model_dir, monkeypatch):
    manifest = read_manifest(own_run / "tokenize")
    section = manifest.recipe["tokenize"] | {"tokenizer": "nobody/gone"}
    gone = manifest.model_copy(update={"recipe": manifest.recipe | {"tokenize": section}})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OrpoError, match=r"tokenize\.tokenizer: cannot open 'nobody/gone'"):
        check_inputs(own_run / "tokenize", gone, tiny_training(), tiny_model_dir)


def test_trackers(monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", ["tensorboard"])
    check_trackers([])
    check_trackers(["tensorboard"])
    check_trackers(["all"])
    with pytest.raises(UsageError, match=r"train\.trackers: unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_trackers(["tensorboard", "tensorbord"])
    with pytest.raises(UsageError, match=r"unknown tracker 'x'; there are .*wandb"):
        check_trackers(["x"])
    with pytest.raises(OrpoError, match=r"train\.trackers: comet_ml is not installed; `pip install comet-ml`"):
        check_trackers(["comet_ml"])
