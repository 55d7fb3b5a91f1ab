"""How a model reads held-out conversations: in the dataset's own token ids, or from their texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import jinja2
import polars as pl
import pyarrow as pa

from orpo_data.chat import Chat, Messages
from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, Manifest, read_manifest
from orpo_data.places import join
from orpo_data.schema import TOKEN_STAGES
from orpo_data.shards import scan
from orpo_train.batching import PairDataset
from orpo_train.evaluate import load_tokenizer


class Answer(NamedTuple):
    """An answer to a prompt."""

    text: str
    ids: list[int] | None  # in the dataset's tokens, with its end token; None where another tokenizer made it
    ended: bool  # by its end token, not by the limit of new tokens
    tokens: int


@dataclass(frozen=True)
class HeldOut:
    """Some held-out pairs of a tokenized dataset, and the texts they were made of."""

    dataset: Path
    manifest: Manifest
    table: pa.Table  # TOKENIZED
    tokenizer: Any  # the dataset's

    @cached_property
    def pairs(self) -> PairDataset:
        return PairDataset(self.table)

    @cached_property
    def ids(self) -> list[str]:
        known: list[str] = self.table["id"].to_pylist()
        return known

    def prompts(self, most: int | None) -> Self:
        """The first pair of each prompt, at most so many."""
        numbers = self.pairs.prompt_number
        first = [row for row in range(len(numbers)) if row == 0 or numbers[row] != numbers[row - 1]][:most]
        return type(self)(self.dataset, self.manifest, self.table.take(first), self.tokenizer)

    def answers(self, side: str) -> list[Answer]:
        """The chosen or rejected answers of the data; with their texts where these are still there."""
        cut = self.table[f"{side}_truncated"].to_pylist()
        made = []
        for row, truncated in enumerate(cut):
            ids = self.pairs.response(row, side).tolist()
            text = self.rows.get(self.ids[row], {}).get(side, [{"content": ""}])[-1]["content"]
            made.append(Answer(text, ids, not truncated, len(ids)))
        return made

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        return rows_with_texts(self.dataset, self.manifest, self.ids)

    def question(self, row: int) -> str:
        """The last message of a prompt; its decoded ids where the texts are gone."""
        if self.ids[row] in self.rows:
            return str(self.rows[self.ids[row]]["prompt"][-1]["content"])
        return str(self.tokenizer.decode(self.pairs.prompt(row)))

    def messages(self, row: int) -> Messages:
        """The prompt of a row as messages, without the oldest turns that its token ids leave out."""
        if self.ids[row] not in self.rows:
            raise OrpoError(
                f"{self.dataset}: the texts of its rows are needed, and the dataset they lie in "
                f"({self.manifest.inputs[0].path}) has none of row {self.ids[row]}"
            )
        prompt: Messages = self.rows[self.ids[row]]["prompt"]
        dropped = self.table["prompt_turns_dropped"][row].as_py()
        start = int(prompt[0]["role"] == "system")
        return prompt[:start] + prompt[start + dropped :]


def rows_with_texts(dataset: Path, manifest: Manifest, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """prompt, chosen and rejected by id, of the dataset that the tokens were made of; empty where that is gone."""
    folder = dataset
    while manifest.stage in TOKEN_STAGES:
        folder = join(folder, manifest.inputs[0].path or "")
        if not (folder / MANIFEST_NAME).exists():
            return {}
        manifest = read_manifest(folder)
    found = scan(folder).filter(pl.col("id").is_in(ids)).select("id", "prompt", "chosen", "rejected").collect()
    return {row["id"]: row for row in found.to_dicts()}


@dataclass(frozen=True)
class Reader:
    """Conversations as one model's token ids."""

    folder: Path
    chat: Chat | None  # None: the dataset's ids are the model's

    @classmethod
    def of(cls, folder: Path, tokenizer: Any) -> Self:
        """Of the model in `folder`, for data made by `tokenizer`.

        A model whose tokenizer has the same vocabulary, and the same chat template or none, reads the data's own ids,
        as does a folder without a tokenizer. Any other reads the texts, in its own template; OrpoError if it has none.
        """
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return cls(folder, None)
        own = load_tokenizer(folder)
        if own.get_vocab() == tokenizer.get_vocab() and own.chat_template in (None, tokenizer.chat_template):
            return cls(folder, None)
        if not own.chat_template:
            raise OrpoError(
                f"{folder}: its tokenizer is not the dataset's and has no chat template, so it cannot read the "
                "prompts; put a chat_template.jinja into the folder"
            )
        return cls(folder, Chat.load(str(folder)))

    def prompts(self, data: HeldOut) -> list[list[int]]:
        """The ids of every row's prompt."""
        if self.chat is None:
            return [data.pairs.prompt(row).tolist() for row in range(len(data.ids))]
        texts = [self._rendered_prompt(self.chat, data, row) for row in range(len(data.ids))]
        encoded: list[list[int]] = self.chat.encode_prompts(pa.array(texts, pa.string())).to_pylist()
        return encoded

    def conversations(self, data: HeldOut, answers: Sequence[Answer]) -> list[list[int]]:
        """The ids of every row's prompt with an answer to it."""
        if self.chat is None and all(answer.ids is not None for answer in answers):
            encoded = [answer.ids or [] for answer in answers]
        else:
            chat = self.chat or Chat(data.tokenizer)
            texts = [self._rendered_answer(chat, data, row, answer.text) for row, answer in enumerate(answers)]
            whole = chat.encode_answers(pa.array(texts, pa.string())).to_pylist()
            encoded = [ids if answer.ended else ids[:-1] for ids, answer in zip(whole, answers, strict=True)]
        return [prompt + ids for prompt, ids in zip(self.prompts(data), encoded, strict=True)]

    def _rendered_prompt(self, chat: Chat, data: HeldOut, row: int) -> str:
        try:
            return chat.render_prompt(data.messages(row))
        except jinja2.TemplateError as error:
            raise OrpoError(f"{self.folder}: its chat template refuses row {data.ids[row]}: {error}") from None

    def _rendered_answer(self, chat: Chat, data: HeldOut, row: int, text: str) -> str:
        if not text.strip():
            return ""  # templates leave nothing of it
        prompt = self._rendered_prompt(chat, data, row)
        return chat.render_answer(data.messages(row), prompt, [{"role": "assistant", "content": text}])
