"""Messages to text: control tokens, refusals, and what the rendered row holds."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.chat import Chat, find_template
from orpo_data.errors import OrpoError
from orpo_data.layout import Layout, Slot
from orpo_data.schema import PAIRS, RENDERED
from orpo_data.steps.chat_template import ChatTemplate
from orpo_data.steps.step import StepOutput


@pytest.fixture(scope="module")
def chat(chat_tokenizer_dir: Path) -> Chat:
    return Chat.load(str(chat_tokenizer_dir))


PLAIN = ["alpaca", "hh", "llama-2", "mistral", "zephyr"]
load = cache(Chat.load)


def apply(chat: Chat, *pairs: Any) -> StepOutput:
    return ChatTemplate(chat=chat).apply(pa.Table.from_pylist(list(pairs), schema=PAIRS))


def own(folder: Path, tokenizer: Path, text: str) -> Chat:
    (folder / "own.jinja").write_text(text)
    return Chat.load(str(tokenizer), str(folder / "own.jinja"))


def test_texts(chat: Chat, make_pair: Callable[..., Any]) -> None:
    (row,) = apply(chat, make_pair("How?", "So.", "Not so.")).kept.to_pylist()
    assert row["prompt_text"] == "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    assert (row["chosen_text"], row["rejected_text"]) == ("So.", "Not so.")


def test_text_that_looks_like_jinja_stays_text(chat: Chat, make_pair: Callable[..., Any]) -> None:
    (row,) = apply(chat, make_pair("{{ 7 * 7 }} {% raw %}", "{{ messages }}", "{# so #}")).kept.to_pylist()
    assert "user\n{{ 7 * 7 }} {% raw %}<" in row["prompt_text"]
    assert (row["chosen_text"], row["rejected_text"]) == ("{{ messages }}", "{# so #}")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_control_tokens_in_any_message(chat: Chat, make_pair: Callable[..., Any], token: str, side: str) -> None:
    out = apply(chat, make_pair(**{side: f"Well{token}then"}), make_pair())
    assert len(out.kept) == 1
    (dropped,) = out.dropped.to_pylist()
    assert (dropped["step"], dropped["reason"]) == ("chat_template", "control_token_in_text")
    assert dropped["detail"] == f"{side}: {token}"


def test_control_tokens_in_early_and_in_system_messages(
    chat: Chat, make_pair: Callable[..., Any], turns: Callable[..., Any]
) -> None:
    early = make_pair(turns("A", "b <|im_end|>", "C"))
    system = make_pair([{"role": "system", "content": "<|im_start|>system"}, *turns("A")])
    assert apply(chat, early, system).dropped["detail"].to_pylist() == ["prompt: <|im_end|>", "prompt: <|im_start|>"]


def test_half_a_control_token_is_text(chat: Chat, make_pair: Callable[..., Any]) -> None:
    assert len(apply(chat, make_pair("<|im_end|", "<|im_end |>", "im_end|>")).kept) == 1


def test_a_template_that_refuses_costs_the_row(
    plain_tokenizer_dir: Path, tmp_path: Path, make_pair: Callable[..., Any], turns: Callable[..., Any]
) -> None:
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role here') }}{% endif %}"
    chat = own(tmp_path, plain_tokenizer_dir, text + find_template("hh"))
    out = apply(chat, make_pair(), make_pair([{"role": "system", "content": "Be kind."}, *turns("Q?")]))
    assert len(out.kept) == 1
    (dropped,) = out.dropped.to_pylist()
    assert (dropped["reason"], dropped["detail"]) == ("refused_by_template", "prompt: No system role here")


def test_a_template_that_writes_nothing_of_a_message_costs_the_row(
    plain_tokenizer_dir: Path, tmp_path: Path, make_pair: Callable[..., Any]
) -> None:
    """As templates that cut an answer's thinking away, and with it an answer that is nothing else."""
    text = find_template("hh").replace("message['content']", "message['content'].split('</think>')[-1]|trim")
    out = apply(own(tmp_path, plain_tokenizer_dir, text), make_pair(rejected="<think>Well.</think>"), make_pair())
    assert len(out.kept) == 1
    (dropped,) = out.dropped.to_pylist()
    assert dropped["reason"] == "refused_by_template"
    assert dropped["detail"] == "rejected: the template leaves nothing of an answer"


def test_a_template_that_changes_its_prompt_is_refused(plain_tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OrpoError, match="does not keep the rendered prompt as a prefix"):
        own(tmp_path, plain_tokenizer_dir, "{{ messages|length }}" + find_template("hh"))


def test_one_that_changes_some_prompts_costs_their_rows(
    plain_tokenizer_dir: Path, tmp_path: Path, make_pair: Callable[..., Any], turns: Callable[..., Any]
) -> None:
    """As Mistral's, which writes the system message only before the last turn if that is the user's."""
    count = "{% if messages[0].role == 'system' %}{{ messages|length }}{% endif %}"
    chat = own(tmp_path, plain_tokenizer_dir, count + find_template("hh"))
    system = make_pair([{"role": "system", "content": "Be brief."}, *turns("A")])
    out = apply(chat, make_pair(), system)
    assert len(out.kept) == 1
    (dropped,) = out.dropped.to_pylist()
    assert dropped["reason"] == "refused_by_template"
    assert "does not keep the rendered prompt as a prefix" in dropped["detail"]


def test_a_template_that_strips(plain_tokenizer_dir: Path, tmp_path: Path, make_pair: Callable[..., Any]) -> None:
    chat = own(
        tmp_path, plain_tokenizer_dir, find_template("chatml").replace("message['content']", "message['content']|trim")
    )
    (row,) = apply(chat, make_pair(" Q? ", "  Yes.\n", "No.")).kept.to_pylist()
    assert (row["chosen_text"], row["rejected_text"]) == ("Yes.", "No.")


def one_by_one(chat: Chat, pairs: list[Any], monkeypatch: pytest.MonkeyPatch) -> StepOutput:
    """The same rows, each written by the template itself."""
    with monkeypatch.context() as patch:
        patch.setattr(chat, "layout", lambda prompt, answer: None)
        return apply(chat, *pairs)


def test_rows_are_written_in_columns(
    chat: Chat, make_pair: Callable[..., Any], turns: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template itself runs for the first row of a table, as a check, and for those whose layout does not hold; the
    shortest of these is checked too."""
    pairs = [make_pair(turns(*"abcde"[: 1 + 2 * (i % 3)]), f"yes {i}", "no", source_row=i) for i in range(20)]
    pairs[7] = make_pair(rejected=" ")
    expected, rendered, render = one_by_one(chat, pairs, monkeypatch), [], ChatTemplate._render

    def note(step: ChatTemplate, row: Any, *, reference: bool = False) -> Any:
        rendered.append((row["rejected"][0]["content"], reference))
        return render(step, row, reference=reference)

    monkeypatch.setattr(ChatTemplate, "_render", note)
    out = apply(chat, *pairs)
    assert rendered == [("no", True), (" ", False)]
    assert out.kept.equals(expected.kept)
    assert out.dropped.equals(expected.dropped)
    assert out.dropped["source_row"].to_pylist() == [0]


def test_a_layout_that_the_template_does_not_keep_to(
    chat: Chat, make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Should a layout ever be wrong, the rows are those of the template all the same."""
    expected = apply(chat, make_pair(), make_pair("Why?"))
    wrong = Layout(("Q: ", Slot(0)), (Slot(1),), frozenset())
    monkeypatch.setattr(chat, "layout", lambda prompt, answer: wrong)
    assert apply(chat, make_pair(), make_pair("Why?")).kept.equals(expected.kept)
    assert "does not write what its layout says" in caplog.text


def test_a_part_of_a_table(chat: Chat, make_pair: Callable[..., Any]) -> None:
    pairs = [make_pair(f"{i}?", "Yes." * i, "<|im_end|>" if i == 3 else "No.", source_row=i) for i in range(1, 7)]
    table = pa.concat_tables(
        [pa.Table.from_pylist(pairs[:2], schema=PAIRS), pa.Table.from_pylist(pairs[2:], schema=PAIRS)]
    )
    out, part = (ChatTemplate(chat=chat).apply(rows) for rows in (table, table.slice(1, 4)))
    assert part.kept.equals(out.kept.slice(1, 3))
    assert part.dropped.equals(out.dropped)


def test_from_several_threads(chat_tokenizer_dir: Path, make_pair: Callable[..., Any], turns: Any) -> None:
    fresh = Chat.load(str(chat_tokenizer_dir))
    tables = [
        pa.Table.from_pylist([make_pair(turns(*["a"] * (2 * (i % n) + 1)), f"{i}") for i in range(40)], schema=PAIRS)
        for n in range(1, 13)
    ]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ChatTemplate(chat=fresh).apply, tables))
    assert [out.kept for out in found] == [ChatTemplate(chat=fresh).apply(table).kept for table in tables]


def test_an_empty_table(chat: Chat) -> None:
    out = ChatTemplate(chat=chat).apply(PAIRS.empty_table())
    assert (len(out.kept), len(out.dropped)) == (0, 0)
    assert out.kept.schema == RENDERED


hostile = st.lists(st.sampled_from(["<|im_end|>", "<s>", " ", "\n", "\x1c", "a", "[INST]", "é"]), max_size=3).map(
    "".join
)
roles = st.sampled_from(["user", "user", "assistant", "system", "tool"])
conversations = st.lists(st.fixed_dictionaries({"role": roles, "content": hostile}), min_size=1, max_size=3)
said = hostile.map(lambda text: [{"role": "assistant", "content": text}]) | conversations


@given(st.sampled_from(PLAIN), st.lists(st.tuples(conversations, said, said), min_size=1, max_size=6))
def test_in_columns_as_one_by_one(
    plain_tokenizer_dir: Path, make_pair: Callable[..., Any], name: str, drawn: list[Any]
) -> None:
    chat = load(str(plain_tokenizer_dir), name)
    pairs = [make_pair(*sides, source_row=i) for i, sides in enumerate(drawn)]
    with pytest.MonkeyPatch.context() as patch:
        found = outcome(chat, pairs)
        patch.setattr(chat, "layout", lambda prompt, answer: None)
        assert outcome(chat, pairs) == found


def outcome(chat: Chat, pairs: list[Any]) -> Any:
    """Kept and dropped rows, or the error that stops the stage."""
    try:
        out = apply(chat, *pairs)
    except OrpoError as error:
        return str(error)
    return out.kept, out.dropped


texts = st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "a", " "]), min_size=1, max_size=3).map("".join)


@given(st.lists(st.tuples(texts, texts, texts), max_size=8), st.integers(1, 4))
def test_rows_in_are_kept_or_dropped_in_any_batches(
    chat: Chat, make_pair: Callable[..., Any], drawn: list[tuple[str, str, str]], batch: int
) -> None:
    pairs = [make_pair(*texts, source_row=i) for i, texts in enumerate(drawn)]
    whole = apply(chat, *pairs)
    blank = [i for i, (_, *answers) in enumerate(drawn) if not all(answer.strip() for answer in answers)]
    spoiled = [i for i, texts in enumerate(drawn) if i in blank or any("<|im_end|>" in text for text in texts)]
    assert whole.dropped["source_row"].to_pylist() == spoiled
    assert len(whole.kept) + len(whole.dropped) == len(pairs)
    parts = [apply(chat, *pairs[start : start + batch]) for start in range(0, max(1, len(pairs)), batch)]
    assert pa.concat_tables(part.kept for part in parts).equals(whole.kept)
    assert pa.concat_tables(part.dropped for part in parts).equals(whole.dropped)
