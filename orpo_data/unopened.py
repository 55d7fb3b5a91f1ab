"""A chat that need not be opened: opening takes seconds, and a stage that is up to date only wants its fingerprint."""

from functools import lru_cache
from threading import Lock
from typing import Any

from orpo_data.chat import Chat, find_template
from orpo_data.tokenizer_files import tokenizer_fingerprint, tokenizer_folder


class UnopenedChat(Chat):
    """A chat that is opened when it is first used; to another process it goes unopened."""

    _opening = Lock()

    def __init__(self, tokenizer: str, chat_template: str | None = None, revision: str | None = None) -> None:
        """OrpoError if there is no such tokenizer; what else is wrong with it shows when it is opened."""
        self._arguments = tokenizer, chat_template, revision
        template = find_template(chat_template) if chat_template else None
        vars(self)["fingerprint"] = tokenizer_fingerprint(tokenizer_folder(tokenizer, revision), template)

    def __getattr__(self, name: str) -> Any:
        """Asked for what is not there, which is everything until it is opened."""
        if name.startswith("__"):
            raise AttributeError(name)
        with self._opening:
            if "tokenizer" not in vars(self):
                vars(self).update(vars(_opened(self.fingerprint, *self._arguments)))
        return object.__getattribute__(self, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"_arguments": self._arguments, "fingerprint": self.fingerprint}


@lru_cache(maxsize=1)
def _opened(fingerprint: str, tokenizer: str, chat_template: str | None, revision: str | None) -> Chat:
    """The last one stays, for the next task of a worker; by its files' contents too, or changes would go unnoticed."""
    return Chat.load(tokenizer, chat_template, revision)
