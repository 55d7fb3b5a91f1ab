"""The named templates: what each writes, to the letter of its published format, and the laws that hold for all."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orpo_data.chat import CONTROL_TOKENS, Chat, template_names
from orpo_data.errors import UsageError
from orpo_data.schema import PAIRS
from orpo_data.steps.chat_template import ChatTemplate
from orpo_data.steps.tokenize import Tokenize
from orpo_data.steps.truncate import Truncate

Messages = list[dict[str, str]]

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = [{"role": "user", "content": "Is moss green?"}]
REPLY = [{"role": "assistant", "content": "It is."}]
AGAIN = [{"role": "user", "content": "And ivy?"}]
ANSWER = [{"role": "assistant", "content": "Too."}]

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# name -> (prompt of one question, prompt of two exchanges with a system message, answer)
PUBLISHED = {
    "alpaca": (
        f"<s>{ALPACA}\n\n### Instruction:\nIs moss green?\n\n### Response:\n",
        "<s>Be brief.\n\n### Instruction:\nIs moss green?\n\n### Response:\nIt is.</s>\n\n"
        "### Instruction:\nAnd ivy?\n\n### Response:\n",
        "Too.</s>",
    ),
    "chatml": (
        "<s><|im_start|>user\nIs moss green?<|im_end|>\n<|im_start|>assistant\n",
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs moss green?<|im_end|>\n"
        "<|im_start|>assistant\nIt is.<|im_end|>\n<|im_start|>user\nAnd ivy?<|im_end|>\n<|im_start|>assistant\n",
        "Too.<|im_end|>",
    ),
    "gemma": (
        "<s><start_of_turn>user\nIs moss green?<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\nBe brief.\n\nIs moss green?<end_of_turn>\n<start_of_turn>model\nIt is.<end_of_turn>\n"
        "<start_of_turn>user\nAnd ivy?<end_of_turn>\n<start_of_turn>model\n",
        "Too.<end_of_turn>",
    ),
    "hh": (
        "<s>\n\nHuman: Is moss green?\n\nAssistant:",
        "<s>Be brief.\n\nHuman: Is moss green?\n\nAssistant: It is.\n\nHuman: And ivy?\n\nAssistant:",
        " Too.</s>",
    ),
    "llama-2": (
        "<s>[INST] Is moss green? [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs moss green? [/INST] It is. </s><s>[INST] And ivy? [/INST]",
        " Too. </s>",
    ),
    "llama-3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nIs moss green?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs moss green?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt is.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd ivy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Too.<|eot_id|>",
    ),
    "mistral": (
        "<s>[INST] Is moss green? [/INST]",
        "<s>[INST] Be brief.\n\nIs moss green? [/INST] It is.</s>[INST] And ivy? [/INST]",
        " Too.</s>",
    ),
    "phi": (
        "<s><|user|>\nIs moss green?<|end|>\n<|assistant|>\n",
        "<s><|system|>\nBe brief.<|end|>\n<|user|>\nIs moss green?<|end|>\n<|assistant|>\nIt is.<|end|>\n"
        "<|user|>\nAnd ivy?<|end|>\n<|assistant|>\n",
        "Too.<|end|>",
    ),
    "qwen": (
        f"<s><|im_start|>system\n{QWEN}<|im_end|>\n<|im_start|>user\nIs moss green?<|im_end|>\n<|im_start|>assistant\n",
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs moss green?<|im_end|>\n"
        "<|im_start|>assistant\nIt is.<|im_end|>\n<|im_start|>user\nAnd ivy?<|im_end|>\n<|im_start|>assistant\n",
        "Too.<|im_end|>",
    ),
    "zephyr": (
        "<s><|user|>\nIs moss green?</s>\n<|assistant|>\n",
        "<s><|system|>\nBe brief.</s>\n<|user|>\nIs moss green?</s>\n<|assistant|>\nIt is.</s>\n"
        "<|user|>\nAnd ivy?</s>\n<|assistant|>\n",
        "Too.</s>",
    ),
}
STRIPS = {"llama-2", "llama-3"}  # as their authors' code does
PLAIN_TEXT = set(PUBLISHED) - set(CONTROL_TOKENS)
EVERY_CONTROL_TOKEN = sorted({token for tokens in CONTROL_TOKENS.values() for token in tokens})


@pytest.fixture(scope="session")
def llama_like_dir(tmp_path_factory: pytest.TempPathFactory, plain_tokenizer_dir: Path) -> Path:
    """A byte-level BPE that knows every template's control tokens and, as Llama's do, puts <s> before every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain_tokenizer_dir)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": EVERY_CONTROL_TOKEN})
    start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
    folder = tmp_path_factory.mktemp("llama-like")
    tokenizer.save_pretrained(folder)
    return folder


def _sentencepiece_like(folder: Path, prepend: str) -> Path:
    """A BPE with Llama's "▁" for spaces: one more before each text, or (legacy) before each part between tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *EVERY_CONTROL_TOKEN]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = "Is▁moss▁green? It▁is. And▁ivy? Too. Be▁brief. [INST] [/INST] user assistant Human: Crimson, ▁mostly."
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *alphabet], show_progress=False)
    backend.train_from_iterator(words.split(" ") * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda prepend: _sentencepiece_like(tmp_path_factory.mktemp(prepend), prepend))


load = cache(lambda folder, template: Chat.load(str(folder), template))


def sequence(chat: Chat, prompt: Messages, answer: Messages) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the response."""
    prompt_text = chat.render_prompt(prompt)
    answer_text = chat.render_answer(prompt, prompt_text, answer)
    prompts, answers = chat.encode_prompts(pa.array([prompt_text])), chat.encode_answers(pa.array([answer_text]))
    return prompts[0].as_py(), answers[0].as_py()


def ids_of(chat: Chat, text: str) -> list[int]:
    ids: list[int] = chat.encode(pa.array([text]))[0].as_py()
    return ids


def tokenized(chat: Chat, *pairs: Any) -> list[dict[str, Any]]:
    """TOKENIZED rows of PAIRS rows, by the steps of the tokenize stage."""
    table = pa.Table.from_pylist(list(pairs), schema=PAIRS)
    limits = {"max_length": 4096, "max_prompt_length": 2048, "overlong_prompt": "drop", "overlong_response": "drop"}
    for step in (ChatTemplate(chat=chat), Tokenize(chat=chat), Truncate(chat=chat, **limits)):
        table = step.apply(table).kept
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_every_named_template_is_here() -> None:
    assert template_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_format(llama_like_dir: Path, name: str) -> None:
    chat = load(llama_like_dir, name)
    for prompt, text in zip((ASK, [SYSTEM, *ASK, *REPLY, *AGAIN]), PUBLISHED[name][:2], strict=True):
        ids, response = sequence(chat, prompt, ANSWER)
        assert chat.tokenizer.decode(ids) == text
        assert chat.tokenizer.decode(response) == PUBLISHED[name][2]
        assert ids == ids_of(chat, text)  # control tokens are read as such


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_is_what_transformers_renders(llama_like_dir: Path, name: str) -> None:
    chat = load(llama_like_dir, name)
    conversation = [SYSTEM, *ASK, *REPLY, *AGAIN, *ANSWER]
    prompt, response = sequence(chat, conversation[:-1], ANSWER)
    whole = chat.tokenizer.apply_chat_template(conversation, chat_template=chat.template, tokenize=False)
    rendered = ids_of(chat, whole)
    own = (prompt if whole.startswith("<s>") else prompt[1:]) + response  # else the tokenizer adds the start token
    if name == "hh":  # has no end of turn of its own
        own.pop()
    assert rendered[: len(own)] == own


@pytest.mark.parametrize("prepend", ["legacy", "first"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_sentencepiece_puts_no_space_of_its_own_between_header_and_answer(
    sentencepiece_like: Callable[[str], Path], prepend: str, name: str
) -> None:
    chat = load(sentencepiece_like(prepend), name)
    prompt, response = sequence(chat, [*ASK, *REPLY, *AGAIN], ANSWER)
    prompt_text = chat.render_prompt([*ASK, *REPLY, *AGAIN])
    whole = ids_of(chat, prompt_text + chat.render_answer([*ASK, *REPLY, *AGAIN], prompt_text, ANSWER))
    assert prompt + response[:-1] == whole


@pytest.mark.parametrize("name", sorted({"mistral", "llama-2", "gemma"}))
def test_a_system_message_without_a_question_to_stand_in_is_refused(
    llama_like_dir: Path, make_pair: Callable[..., Any], name: str
) -> None:
    out = ChatTemplate(chat=load(llama_like_dir, name)).apply(pa.Table.from_pylist([make_pair([SYSTEM])], schema=PAIRS))
    (dropped,) = out.dropped.to_pylist()
    assert dropped["reason"] == "refused_by_template"
    assert dropped["detail"] == "prompt: the system message needs a user message behind it"


@pytest.mark.parametrize("name", CONTROL_TOKENS)
def test_a_tokenizer_without_the_templates_control_tokens(plain_tokenizer_dir: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Chat.load(str(plain_tokenizer_dir), name)
    message = str(caught.value)
    assert message.startswith(f"tokenize.chat_template: '{name}' writes '{CONTROL_TOKENS[name][0]}', which is no token")
    assert message.endswith("or a template in plain text (alpaca, hh, llama-2, mistral, zephyr)")
    assert "\n" not in message


@pytest.mark.parametrize("name", sorted(PLAIN_TEXT))
def test_a_template_in_plain_text_takes_any_tokenizer(plain_tokenizer_dir: Path, name: str) -> None:
    _, response = sequence(load(plain_tokenizer_dir, name), ASK, REPLY)
    assert response.count(load(plain_tokenizer_dir, name).tokenizer.eos_token_id) == 1


def test_a_control_token_that_the_tokenizer_calls_ordinary_is_one_all_the_same(
    tmp_path: Path, plain_tokenizer_dir: Path, make_pair: Callable[..., Any]
) -> None:
    """Some tokenizers have their turn tokens as added, but not special ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain_tokenizer_dir)
    tokenizer.add_tokens(list(CONTROL_TOKENS["gemma"]), special_tokens=False)
    tokenizer.save_pretrained(tmp_path)
    chat = Chat.load(str(tmp_path), "gemma")
    assert chat.end_of_turn_id == chat.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    pairs = pa.Table.from_pylist([make_pair(), make_pair(chosen="So <end_of_turn> then.")], schema=PAIRS)
    out = ChatTemplate(chat=chat).apply(pairs)
    assert len(out.kept) == 1
    assert out.dropped["detail"].to_pylist() == ["chosen: <end_of_turn>"]


@pytest.mark.parametrize("prepend", ["legacy", "first"])
@given(
    st.sampled_from(["\n\nAssistant:", "Hum"]), st.lists(st.text("Ti:s▁ \n[/", max_size=6) | st.just("an:"), max_size=5)
)
def test_answers_behind_their_header(
    sentencepiece_like: Callable[[str], Path], prepend: str, header: str, answers: list[str]
) -> None:
    """A token across the seam ("Human:") is left alone: the prompt's ids must not depend on the answer."""
    chat = load(sentencepiece_like(prepend), "hh")
    head, expected = ids_of(chat, header), []
    for answer in answers:
        whole = ids_of(chat, header + answer)
        expected.append(whole[len(head) :] if whole[: len(head)] == head else ids_of(chat, answer))
    assert chat._encode_behind(header, pa.array(answers, pa.string())).to_pylist() == expected
    across = ids_of(chat, "Human:")
    assert across[: len(ids_of(chat, "Hum"))] != ids_of(chat, "Hum")


# --- laws ------------------------------------------------------------------------------------------------------------

pieces = ["<|im_", "start|>", "end|>", "<start_of", "_turn>", "</", "s>", "[INST]", " [/INST] ", "<<SYS>>", "a ", "\n"]
texts = st.one_of(
    st.lists(st.sampled_from(pieces), min_size=1, max_size=4).map("".join),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
).filter(lambda text: text.strip())


@given(
    st.sampled_from(sorted(PUBLISHED)),
    st.lists(texts, min_size=1, max_size=5).filter(lambda drawn: len(drawn) % 2 == 1),
    st.booleans(),
    texts,
    texts,
)
def test_laws_of_every_template(
    llama_like_dir: Path,
    make_pair: Callable[..., Any],
    name: str,
    drawn: list[str],
    system: bool,
    chosen: str,
    rejected: str,
) -> None:
    chat = load(llama_like_dir, name)
    assume(
        not any(
            token in text for text in (*drawn, chosen, rejected) for token in (*chat.control_tokens, *chat.turn_labels)
        )
    )
    assume(chosen.strip() != rejected.strip())
    control = {chat.tokenizer.convert_tokens_to_ids(token) for token in chat.control_tokens}

    def controls(ids: list[int]) -> list[int]:
        return [i for i in ids if i in control]

    def conversation(contents: list[str]) -> Messages:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        return [SYSTEM, *turns] if system else turns

    row, plain = tokenized(
        chat,
        make_pair(conversation(drawn), chosen, rejected),
        make_pair(conversation(["word"] * len(drawn)), "yes", "no"),
    )
    prompt = row["chosen_input_ids"][: row["prompt_len"]]
    assert prompt == row["rejected_input_ids"][: row["prompt_len"]]  # the same prompt on both sides
    assert prompt[0] == chat.tokenizer.bos_token_id  # one start token; Llama 2 has one an exchange
    assert prompt.count(chat.tokenizer.bos_token_id) == ((len(drawn) + 1) // 2 if name == "llama-2" else 1)
    assert controls(prompt) == controls(plain["chosen_input_ids"][: plain["prompt_len"]])  # by roles, not by texts
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        response = row[f"{side}_input_ids"][row["prompt_len"] :]
        assert len(response) >= 2
        assert controls(response) == [response[-1]] == [chat.end_of_turn_id]  # end of turn once, and last
        decoded = chat.tokenizer.decode(response[:-1], clean_up_tokenization_spaces=False)
        expected = {"hh": f" {text}", "mistral": f" {text}", "llama-2": f" {text.strip()} "}.get(name, text)
        assert decoded == (expected.strip() if name == "llama-3" else expected)
