"""Texts to ids: the prompt once for both sides, each answer with its end of turn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.chat import Chat
from orpo_data.schema import ENCODED, RENDERED
from orpo_data.steps.chat_template import ChatTemplate
from orpo_data.steps.tokenize import Tokenize


@pytest.fixture(scope="module")
def chat(chat_tokenizer_dir: Path) -> Chat:
    return Chat.load(str(chat_tokenizer_dir))


@pytest.fixture(scope="module")
def opt_like(plain_tokenizer_dir: Path) -> Chat:
    return Chat.load(str(plain_tokenizer_dir), "hh")


def encode(chat: Chat, rows: pa.Table) -> pa.Table:
    out = Tokenize(chat=chat).apply(ChatTemplate(chat=chat).apply(rows).kept)
    assert len(out.dropped) == 0
    assert out.kept.schema == ENCODED
    return out.kept


def test_ids_are_those_of_the_whole_conversation(
    chat: Chat, make_pair: Callable[..., Any], make_pairs: Callable[..., pa.Table], turns: Callable[..., Any]
) -> None:
    prompt = turns("How often?", "Twice.", "And the fern?")
    (row,) = encode(chat, make_pairs([make_pair(prompt, "Thrice.", "Never.")])).to_pylist()
    for side, text in (("chosen", "Thrice."), ("rejected", "Never.")):
        conversation = [*prompt, {"role": "assistant", "content": text}]
        whole = chat.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
        ids = row["prompt_ids"] + row[f"{side}_response_ids"]
        assert ids == whole[: len(ids)]
        assert chat.tokenizer.decode(whole[len(ids) :]) == "\n"  # the template's own, after the end of turn


def test_start_token_once(opt_like: Chat, make_pairs: Callable[..., pa.Table]) -> None:
    for row in encode(opt_like, make_pairs(3)).to_pylist():
        sides = (row["chosen_response_ids"], row["rejected_response_ids"])
        assert row["prompt_ids"].count(opt_like.bos_id) == 1
        assert row["prompt_ids"][0] == opt_like.bos_id
        assert all(ids.count(opt_like.end_of_turn_id) == 1 and ids[-1] == opt_like.end_of_turn_id for ids in sides)


def test_columns_in_several_pieces(chat: Chat, make_pairs: Callable[..., pa.Table]) -> None:
    rows = ChatTemplate(chat=chat).apply(make_pairs(5)).kept
    apart = pa.concat_tables([rows.slice(0, 2), rows.slice(2, 0), rows.slice(2)])
    assert Tokenize(chat=chat).apply(apart).kept.equals(Tokenize(chat=chat).apply(rows).kept)


def test_an_empty_table(chat: Chat) -> None:
    assert len(Tokenize(chat=chat).apply(RENDERED.empty_table()).kept) == 0


@given(st.integers(0, 7), st.integers(1, 4))
def test_batches_do_not_matter(chat: Chat, make_pairs: Callable[..., pa.Table], rows: int, batch: int) -> None:
    table = make_pairs(rows)
    parts = [encode(chat, table.slice(start, batch)) for start in range(0, max(1, rows), batch)]
    assert pa.concat_tables(parts).equals(encode(chat, table))
