"""What can be known to go wrong before a training run starts: broken data, another tokenizer, a tracker that is not
there.
"""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orpo_data.chat import Chat
from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import Manifest
from orpo_data.shards import check_sizes, open_shard, opened_shards
from orpo_train.config import TrainConfig

log = logging.getLogger(__name__)

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_inputs(dataset: Path, manifest: Manifest, config: TrainConfig, base: Path) -> Chat:
    """OrpoError for what would spoil the run; returns the tokenizer and the template that made the dataset."""
    check_trackers(config.trackers)
    check_shards(dataset, manifest)
    chat = chat_of(manifest)
    check_tokenizer(chat.tokenizer, base, config.model)
    return chat


def chat_of(manifest: Manifest) -> Chat:
    """The tokenizer and the template that made a tokenized dataset; OrpoError when they cannot be had any more."""
    settings = manifest.recipe["tokenize"]
    return Chat.load(settings["tokenizer"], settings["chat_template"], settings["revision"])


def check_shards(dataset: Path, manifest: Manifest) -> None:
    """OrpoError naming the first shard of the data that is not what the manifest says; reads every byte."""
    check_sizes(dataset, manifest)
    for _ in opened_shards(dataset, manifest.shards, open_shard):
        pass


def check_tokenizer(tokenizer: Any, base: Path, model: str) -> None:
    """OrpoError if the dataset's ids mean other tokens to the tokenizer in the base model's folder, if it has one.

    `model` is the base model as the settings name it, `base` its local folder.
    """
    if not any((base / name).is_file() for name in VOCABULARY_FILES):
        return
    from transformers import AutoTokenizer

    try:
        models = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        log.warning("the tokenizer of %s cannot be opened, so it is not compared with the dataset's: %s", model, reason)
        return
    if difference := vocabulary_difference(tokenizer, models):
        token, of_dataset, of_model = difference
        known = f"id {of_model}" if of_model is not None else "unknown"
        raise OrpoError(
            f"train.model: the tokenizer of {model} is not {tokenizer.name_or_path}, which made the dataset: "
            f"{token!r} is id {of_dataset} in the dataset and {known} to the model; set tokenize.tokenizer to the "
            "model's and prepare the dataset again"
        )


def vocabulary_difference(dataset: Any, model: Any) -> tuple[str, int, int | None] | None:
    """The first token, by id, that is another one to the model: (token, its id in the dataset, to the model).

    A control token may have another name, or be new to the model: that is how a chat template is put on a base model.
    """
    theirs: dict[str, int] = model.get_vocab()
    by_id = {number: token for token, number in theirs.items()}
    control = _control_tokens(dataset) | _control_tokens(model)
    for token, number in sorted(dataset.get_vocab().items(), key=lambda item: (item[1], item[0])):
        renamed = token in control and token not in theirs and by_id.get(number, token) in control
        if theirs.get(token) != number and not renamed:
            return token, number, theirs.get(token)
    return None


def _control_tokens(tokenizer: Any) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def check_trackers(names: Sequence[str]) -> None:
    """UsageError for a tracker that accelerate does not know, OrpoError for one whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [*map(str, LOGGER_TYPE_TO_CLASS), "all"]
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"train.trackers: unknown tracker {name!r}; {hint}")
        if name not in installed and name != "all":
            raise OrpoError(f"train.trackers: {name} is not installed; `pip install {name.replace('_', '-')}`")
