"""`orpo inspect`: marks in a pipe, colours on a terminal, the loss mask as the trainer has it, lossless decoding."""

import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import orpo_data
from orpo_data.chat import Chat
from orpo_data.manifest import read_manifest
from orpo_data.schema import JUDGED
from pipelines import inspection

load = cache(lambda folder: Chat.load(str(folder)))


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Callable[..., io.StringIO]:
    """Puts another console in place of stdout's, and returns what it prints to."""

    def put(**settings: Any) -> io.StringIO:
        file = io.StringIO()
        monkeypatch.setattr(inspection, "out", Console(file=file, highlight=False, **settings))
        return file

    return put


def inspect(folder: Path, rows: int = 1, full: bool = False) -> None:
    inspection.print_dataset(folder, read_manifest(folder), rows, full)


def test_in_a_pipe_every_line_of_an_answer_is_marked(console: Callable[..., io.StringIO], prepared: Path) -> None:
    printed = console(width=60)
    inspect(prepared / "tokenize")
    row = orpo_data.load(prepared / "tokenize")[0]
    chat = load(Path(read_manifest(prepared / "tokenize").recipe["tokenize"]["tokenizer"]))
    lines = printed.getvalue().split("train: ")[1].split("eval: ")[0].splitlines()
    for side, mark in (("chosen", "  + "), ("rejected", "  - ")):
        marked = "".join(line.removeprefix(mark) for line in lines if line.startswith(mark))
        response = row[f"{side}_input_ids"][row["prompt_len"] :]
        text = f"[{len(response)} tokens] {chat.tokenizer.decode(response)}"
        assert "".join(marked.split()) == "".join(text.split())
    prompt = "".join(line for line in lines if line.startswith("    "))
    assert "<|im_start|>assistant" in prompt
    assert "<|im_end|>" in prompt
    assert "\x1b" not in printed.getvalue()


def test_on_a_terminal_the_tokens_in_the_loss_lie_on_colour_and_no_others(
    console: Callable[..., io.StringIO], prepared: Path
) -> None:
    printed = console(width=300, force_terminal=True, color_system="truecolor")
    inspect(prepared / "tokenize")
    row = orpo_data.load(prepared / "tokenize")[0]
    first = printed.getvalue().split(row["id"])[1].split("eval")[0]
    chat = load(Path(read_manifest(prepared / "tokenize").recipe["tokenize"]["tokenizer"]))
    for side, grounds in (("chosen", "22|28"), ("rejected", "88|160")):  # of green, of red
        marked = re.findall(rf"\x1b\[97;48;5;(?:{grounds})m(.*?)\x1b\[0m", first)
        text = chat.tokenizer.decode(row[f"{side}_input_ids"][row["prompt_len"] :])
        assert "".join(marked) == text.replace("\n", "")
    assert "48;" not in first.split("+ ")[0]


plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(plain)
def test_the_texts_of_the_tokens_make_up_the_text(chat_tokenizer_dir: Path, text: str) -> None:
    chat = load(chat_tokenizer_dir)
    ids = chat.encode(pa.array([text]))[0].as_py()
    pieces = list(inspection.token_texts(chat, ids))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_shows_with_the_last_of_them(chat_tokenizer_dir: Path) -> None:
    chat = load(chat_tokenizer_dir)
    ids = chat.encode(pa.array(["a\N{SNOWMAN}b"]))[0].as_py()
    assert list(inspection.token_texts(chat, ids)) == ["a", "", "", "\N{SNOWMAN}", "b"]


def test_a_tokenizer_that_drops_the_first_words_space() -> None:
    """As Llama's: decoded alone, no token would have the space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁moss": 0, "▁is": 1, "▁green": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    chat = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    assert list(inspection.token_texts(chat, [0, 1, 2])) == ["moss", " is", " green"]  # type: ignore[arg-type]


def test_long_texts_lose_their_middle(
    console: Callable[..., io.StringIO], make_pair: Callable[..., Any], chat_tokenizer_dir: Path
) -> None:
    printed = console(width=5000)
    text = f"BEGIN{'x' * 2000}MIDDLE{'x' * 2000}END"
    inspection._print_text_row(make_pair(chosen=text), full=False)
    shown = printed.getvalue()
    assert "BEGIN" in shown
    assert "END" in shown
    assert "MIDDLE" not in shown
    assert f"{len(text) - inspection.SHOWN_CHARACTERS:,} characters" in shown
    inspection._print_text_row(make_pair(chosen=text), full=True)
    assert text in printed.getvalue()
    chat = load(chat_tokenizer_dir)
    ids = chat.encode(pa.array([text]))[0].as_py()
    shortened = inspection._shaded(chat, ids, "chosen", full=False).plain
    assert f"{len(ids) - inspection.SHOWN_TOKENS:,} tokens" in shortened
    assert "MIDDLE" not in shortened
    assert inspection._shaded(chat, ids, "chosen", full=True).plain == text


def test_what_is_known_of_a_pair_stands_above_it(
    console: Callable[..., io.StringIO], make_pair: Callable[..., Any]
) -> None:
    printed = console(width=200)
    flags = [
        {"rule": "refusal", "side": "chosen", "value": None},
        {"rule": "length_ratio", "side": "both", "value": 4.25},
    ]
    scores = {"score_chosen": 8.5, "score_rejected": 3.0, "model_chosen": "gpt-4", "model_rejected": "falcon"}
    row = make_pair(**scores) | {"flags": flags, "label_noise": 0.8349}
    (row,) = pa.Table.from_pylist([row], schema=JUDGED).to_pylist()
    inspection._print_text_row(row, full=False)
    lines = [line.strip() for line in printed.getvalue().splitlines()]
    assert lines[2:6] == [
        "score 8.5 over 3",
        "model gpt-4 over falcon",
        "flags: refusal (chosen), length_ratio 4.25 (both)",
        "label noise 0.83",
    ]
    inspection._print_text_row(make_pair() | {"flags": [], "label_noise": None}, full=False)
    assert "flags" not in printed.getvalue().split("label noise")[1]
