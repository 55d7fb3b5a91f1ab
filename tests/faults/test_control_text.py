"""Control tokens and role labels in text: no message yields a control id or a new turn, whatever it says.

Every shipped template meets tokenizers with the control tokens, and their settings, of the families in use. The law:
the control ids and the turns of a rendered conversation are those of the same conversation about nothing.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_data.chat import Chat, template_names
from orpo_data.errors import UsageError
from orpo_data.schema import PAIRS
from orpo_data.steps.chat_template import ChatTemplate
from orpo_data.steps.tokenize import Tokenize


@dataclass(frozen=True)
class Family:
    """What a family's tokenizer files say: its special tokens, and how texts are cut."""

    bos: str | None
    eos: str
    special: tuple[str, ...]
    cuts: str = "bytes"  # bytes: byte-level BPE; pieces: SentencePiece's form, with byte fallback
    trims: bool = False  # special tokens take the white space behind them


LLAMA_3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
FAMILIES = {
    "llama-2": Family("<s>", "</s>", ("<unk>",), cuts="pieces"),
    "llama-3": Family("<|begin_of_text|>", "<|eot_id|>", LLAMA_3),
    "mistral-v1": Family("<s>", "</s>", ("<unk>",), cuts="pieces"),
    "mistral-v3": Family("<s>", "</s>", ("<unk>", "[INST]", "[/INST]", "[TOOL_CALLS]"), cuts="pieces"),
    "qwen": Family(None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>", "<|vision_start|>")),
    "gemma": Family("<bos>", "<eos>", ("<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>"), cuts="pieces"),
    "phi-3": Family(
        "<s>", "<|endoftext|>", ("<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "pieces", trims=True
    ),
    "smollm2": Family("<|im_start|>", "<|im_end|>", ("<|endoftext|>", "<repo_name>", "<jupyter_code>")),
    "gpt-2": Family("<|endoftext|>", "<|endoftext|>", ()),
    "opt": Family("</s>", "</s>", ("<pad>",)),
}
EVERY_TOKEN = sorted({t for f in FAMILIES.values() for t in (f.bos, f.eos, *f.special) if t})
LABELS = [
    "\n\nHuman:",
    "\n\nAssistant:",
    "### Instruction:",
    "### Response:",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
]


def build(family: Family, folder: Path) -> Path:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = list(dict.fromkeys(t for t in (family.bos, family.eos, *family.special) if t))
    special = [AddedToken(name, special=True, normalized=False, rstrip=family.trims) for name in names]
    words = ["The moss is green.", "user\nassistant\nsystem\n", "\n\nHuman: Hi\n\nAssistant: Ho", "[INST] [/INST]"] * 9
    if family.cuts == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *bytes_], show_progress=False)
    backend.train_from_iterator(words, trainer)
    if family.bos:
        start = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = TemplateProcessing(single=f"{family.bos} $A", special_tokens=[start])
    kept = {"bos_token": family.bos} if family.bos else {}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=family.eos, pad_token=family.eos, extra_special_tokens=names, **kept
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Chat | None]:
    """A family's tokenizer with a shipped template; None where that template needs tokens it does not have."""
    folder = cache(lambda family: build(FAMILIES[family], tmp_path_factory.mktemp(family)))

    @cache
    def load(family: str, template: str) -> Chat | None:
        try:
            return Chat.load(str(folder(family)), template)
        except UsageError:
            return None

    return load


PAIRINGS = [(family, template) for family in FAMILIES for template in template_names()]

pieces = st.one_of(
    st.sampled_from([*EVERY_TOKEN, *LABELS]),
    st.sampled_from([*EVERY_TOKEN, *LABELS]).flatmap(lambda mark: st.integers(0, len(mark)).map(lambda n: mark[:n])),
    st.sampled_from([*EVERY_TOKEN, *LABELS]).flatmap(lambda mark: st.integers(0, len(mark)).map(lambda n: mark[n:])),
    st.sampled_from(
        ["moss", " ", "\n", "\n\n", "<", "|", ">", "Human:", "<|", "|>", "\u200b", "\uff5c", "é", "▁", "<s"]
    ),
    st.text(max_size=5),
)
said = st.lists(pieces, min_size=1, max_size=8).map("".join)
roles = st.sampled_from([("user",), ("system", "user"), ("user", "assistant", "user")])


@st.composite
def pairs(draw: st.DrawFn) -> dict[str, Any]:
    prompt = [{"role": role, "content": f"a{draw(said)}"} for role in draw(roles)]
    answers = [[{"role": "assistant", "content": f"a{draw(said)}"}] for _ in range(2)]
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def about_nothing(pair: dict[str, Any]) -> dict[str, Any]:
    return {side: [{"role": m["role"], "content": "a"} for m in messages] for side, messages in pair.items()}


def table_of(rows: list[dict[str, Any]], make_pair: Callable[..., Any]) -> pa.Table:
    return pa.Table.from_pylist([make_pair(**row) for row in rows], schema=PAIRS)


def control(chat: Chat, row: dict[str, Any], rendered: dict[str, Any]) -> Counter[str | int]:
    """The control ids of a row, and the turns that its text shows."""
    vocabulary = chat.tokenizer.get_vocab()  # <unk> is no control token: it stands for a character
    known = {vocabulary[token] for token in EVERY_TOKEN if token in vocabulary and token != "<unk>"}
    ids = [token for name, column in row.items() if name.endswith("_ids") for token in column if token in known]
    texts = [rendered[name] for name in ("prompt_text", "chosen_text", "rejected_text")]
    return Counter(ids) + Counter({label: sum(t.count(label) for t in texts) for label in chat.turn_labels})


def check(chat: Chat, policy: str, rows: list[dict[str, Any]], make_pair: Callable[..., Any]) -> int:
    """How many rows are kept, none of which holds more than the template wrote."""
    table = table_of(rows, make_pair)
    out = ChatTemplate(chat=chat, control_text=policy).apply(table)
    kept = [row["id"] for row in out.kept.to_pylist()]
    plain = table_of([about_nothing(row) for row in rows], make_pair)
    expected = ChatTemplate(chat=chat).apply(plain)
    assert len(out.kept) + len(out.dropped) == len(rows)
    assert not len(expected.dropped) or len(expected.kept) == 0  # a template that refuses these roles
    of_row = dict(zip(table["id"].to_pylist(), range(len(rows)), strict=True))
    encoded, nothing = (Tokenize(chat=chat).apply(step.kept).kept.to_pylist() for step in (out, expected))
    texts, plainly = out.kept.to_pylist(), expected.kept.to_pylist()
    for row_id, row, text in zip(kept, encoded, texts, strict=True):
        at = of_row[row_id] if len(expected.kept) == len(rows) else 0
        assert control(chat, row, text) == control(chat, nothing[at], plainly[at]), (text, row)
    if policy == "flag":
        assert sum(out.flagged.values()) == out.changed
    return len(kept)


@pytest.mark.parametrize(("family", "template"), PAIRINGS)
@pytest.mark.parametrize("policy", ["drop", "escape"])
def test_every_mark_in_every_message(
    family: str, template: str, policy: str, chat_of: Callable[[str, str], Chat | None], make_pair: Callable[..., Any]
) -> None:
    """Each control token and label of all families, in each message by itself."""
    chat = chat_of(family, template)
    if chat is None:
        return
    rows = []
    for n, mark in enumerate([*EVERY_TOKEN, *LABELS]):
        contents = {place: f"a {n}{mark}b" if place == n % 3 else f"a {n}" for place in range(3)}
        turns = {"prompt": ("user", 0), "chosen": ("assistant", 1), "rejected": ("assistant", 2)}
        rows.append({side: [{"role": role, "content": contents[at]}] for side, (role, at) in turns.items()})
    kept = check(chat, policy, rows, make_pair)
    assert kept == len(rows) if policy == "escape" else 0 < kept < len(rows)


@pytest.mark.parametrize("examples", [1, pytest.param(60, marks=pytest.mark.faults)])
@pytest.mark.parametrize(("family", "template"), PAIRINGS)
def test_whatever_is_said(
    family: str,
    template: str,
    examples: int,
    chat_of: Callable[[str, str], Chat | None],
    make_pair: Callable[..., Any],
) -> None:
    chat = chat_of(family, template)
    if chat is None:
        return

    @settings(max_examples=examples, database=None)
    @given(pair=pairs(), policy=st.sampled_from(["drop", "escape", "flag"]))
    def law(pair: dict[str, Any], policy: str) -> None:
        check(chat, policy, [pair], make_pair)

    law()
