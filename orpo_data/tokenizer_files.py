"""A tokenizer told from its files: opening it takes seconds, and a stage that is up to date has no need of it."""

from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from orpo_data.errors import OrpoError
from orpo_data.manifest import digest
from orpo_data.places import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "config.json",
)
TEMPLATE_FILE, SETTINGS_FILE, MODEL_FILE = "chat_template.jinja", "tokenizer_config.json", "config.json"
TELLS_THE_TIME = "strftime_now"  # what a template calls for it
DECIDES_THE_CLASS = ("model_type", "tokenizer_class")


def tokenizer_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a tokenizer, from the hub where `name` is none here; OrpoError if there is none by that name."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    from orpo_data.hub import HUB_ERRORS, reason

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except HUB_ERRORS as error:
        raise OrpoError(f"tokenize.tokenizer: cannot open {name!r}: {reason(error)}") from error


def tokenizer_fingerprint(folder: Path, template: str | None = None) -> str:
    """Hash of everything that decides the ids: vocabulary, merges, special tokens, the text of the chat template.

    `template` stands in for the tokenizer's own. The release of transformers that reads the files is in it too, and
    the day where the template writes it.
    """
    files = sorted({file for pattern in PATTERNS for file in folder.glob(pattern)})
    contents: dict[str, Any] = {file.name: _content(file) for file in files if file.name != TEMPLATE_FILE}
    settings = contents.get(SETTINGS_FILE, {})
    own = settings.pop("chat_template", None)
    if (folder / TEMPLATE_FILE).is_file():
        own = (folder / TEMPLATE_FILE).read_text("utf-8")
    written = template or own
    today = [date.today().isoformat()] if TELLS_THE_TIME in str(written) else []
    return digest([contents, written, version("transformers"), version("tokenizers"), *today])


def _content(file: Path) -> Any:
    """What counts of one file."""
    if file.name == SETTINGS_FILE:
        return _object(file)
    if file.name == MODEL_FILE:
        config = _object(file)
        return {name: config.get(name) for name in DECIDES_THE_CLASS}
    return file_sha256(file)


def _object(file: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise OrpoError(f"{file}: unreadable ({error})") from None
    if not isinstance(value, dict):
        raise OrpoError(f"{file}: not a JSON object")
    return value


def model_of(name: str, folder: Path) -> "PreTrainedConfig | None":
    """What `AutoTokenizer` asks of the model's configuration, if the tokenizer's own files name its class.

    Else it reads the configuration itself, and imports the model's code (and torch) for it, which takes seconds.
    """
    settings = _object(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    if not settings.get("tokenizer_class") or "auto_map" in settings or not (folder / MODEL_FILE).is_file():
        return None
    from transformers import PreTrainedConfig  # slow to import, and only needed here

    model, config = _object(folder / MODEL_FILE), PreTrainedConfig(name_or_path=name)
    for key in ("model_type", "model_name", "tokenizer_class"):
        if key in model:
            setattr(config, key, model[key])
    return config
