"""A tokenizer with its template: prefixes, start and end tokens, refusals in one line, nothing executed."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.chat import Chat, find_template
from orpo_data.errors import OrpoError, UsageError
from orpo_data.layout import Layout

Messages = list[dict[str, str]]

ASK = [{"role": "user", "content": "How often?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
REPLY = [{"role": "assistant", "content": "Twice."}]


def sequence(chat: Chat, prompt: Messages, answer: Messages) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the response."""
    prompt_text = chat.render_prompt(prompt)
    answer_text = chat.render_answer(prompt, prompt_text, answer)
    prompts, answers = chat.encode_prompts(pa.array([prompt_text])), chat.encode_answers(pa.array([answer_text]))
    return prompts[0].as_py(), answers[0].as_py()


def write_template(folder: Path, text: str) -> str:
    file = folder / "own.jinja"
    file.write_text(text)
    return str(file)


def test_the_tokenizers_own_template(chat_tokenizer_dir: Path) -> None:
    chat = Chat.load(str(chat_tokenizer_dir))
    prompt, response = sequence(chat, [SYSTEM, *ASK], REPLY)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow often?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.tokenizer.decode(prompt) == text
    assert chat.tokenizer.decode(response) == "Twice.<|im_end|>"
    assert chat.end_of_turn_id == chat.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_of_several_templates_the_default_one(chat_tokenizer_dir: Path, tmp_path: Path) -> None:
    chat = Chat.load(str(chat_tokenizer_dir))
    for folder, names in (("with", ["tool_use", "default"]), ("without", ["tool_use", "rag"])):
        several = Chat.load(str(chat_tokenizer_dir)).tokenizer
        several.chat_template = {name: find_template("hh") for name in names} | (
            {"default": chat.template} if "default" in names else {}
        )
        several.save_pretrained(tmp_path / folder)
    assert Chat.load(str(tmp_path / "with")).template == chat.template
    with pytest.raises(UsageError, match=r"no chat template called default, only .*; set tokenize\.chat_template"):
        Chat.load(str(tmp_path / "without"))


@pytest.fixture(scope="module")
def prefixing_tokenizer_dir(chat_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It puts a space before the first word of a text."""
    folder = tmp_path_factory.mktemp("tokenizer") / "prefixing"
    shutil.copytree(chat_tokenizer_dir, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_behind_the_header_an_answer_has_no_space_before_it(prefixing_tokenizer_dir: Path) -> None:
    chat = Chat.load(str(prefixing_tokenizer_dir))
    prompt, response = sequence(chat, ASK, REPLY)
    whole = chat.tokenizer.apply_chat_template([*ASK, *REPLY], tokenize=True, return_dict=False)
    assert prompt + response == whole[: len(prompt + response)]
    assert response != [*chat.encode(pa.array(["Twice."]))[0].as_py(), chat.end_of_turn_id]


TEXTS = st.text("ab \n'1é<|>", max_size=8)


@pytest.mark.parametrize("kind", ["chat", "plain", "prefixing"])
@given(rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=4))
def test_a_pair_is_encoded_like_its_texts(
    kind: str, request: pytest.FixtureRequest, rows: list[tuple[str, str, str]]
) -> None:
    chat = Chat.load(str(request.getfixturevalue(f"{kind}_tokenizer_dir")), None if kind != "plain" else "hh")
    prompts, chosen, rejected = (pa.array([row[i] for row in rows], pa.string()) for i in range(3))
    apart = chat.encode_prompts(prompts), chat.encode_answers(chosen), chat.encode_answers(rejected)
    assert all(map(pa.ListArray.equals, chat.encode_pairs(prompts, chosen, rejected), apart))


def test_threads_that_meet_the_same_roles_find_their_layout_once(
    chat_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat.load(str(chat_tokenizer_dir))
    found, find = [], chat._find_layout

    def slowly(*roles: tuple[str, ...]) -> Layout | None:
        found.append(roles)
        time.sleep(0.05)
        return find(*roles)

    monkeypatch.setattr(chat, "_find_layout", slowly)
    with ThreadPoolExecutor(4) as pool:
        layouts = list(pool.map(chat.layout, [("user",)] * 4, [("assistant",)] * 4))
    assert found == [(("user",), ("assistant",))]
    assert layouts[0]
    assert all(layout is layouts[0] for layout in layouts)


def test_a_tokenizer_without_template_and_with_one_token_for_start_and_end(plain_tokenizer_dir: Path) -> None:
    """As OPT's; the named templates have test_chat_templates.py."""
    chat = Chat.load(str(plain_tokenizer_dir), "zephyr")
    prompt, response = sequence(chat, ASK, REPLY)
    end = chat.tokenizer.eos_token_id
    assert prompt[0] == chat.bos_id == end
    assert prompt[1] != end
    assert response[-1] == chat.end_of_turn_id == end
    assert response.count(end) == 1


def test_the_hh_template_writes_the_transcripts_layout(plain_tokenizer_dir: Path) -> None:
    chat = Chat.load(str(plain_tokenizer_dir), "hh")
    prompt, response = sequence(chat, [*ASK, *REPLY, {"role": "user", "content": "Sure?"}], REPLY)
    assert (
        chat.tokenizer.decode(prompt) == "</s>\n\nHuman: How often?\n\nAssistant: Twice.\n\nHuman: Sure?\n\nAssistant:"
    )
    assert chat.tokenizer.decode(response) == " Twice.</s>"


def test_a_start_token_that_the_template_writes_is_not_doubled(plain_tokenizer_dir: Path, tmp_path: Path) -> None:
    template = write_template(tmp_path, "{{ bos_token }}" + find_template("hh"))
    chat = Chat.load(str(plain_tokenizer_dir), template)
    prompt, _ = sequence(chat, ASK, REPLY)
    assert prompt == sequence(Chat.load(str(plain_tokenizer_dir), "hh"), ASK, REPLY)[0]


def test_a_template_that_ends_the_turn_with_a_word_before_the_token(plain_tokenizer_dir: Path, tmp_path: Path) -> None:
    template = write_template(
        tmp_path,
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} over.{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    chat = Chat.load(str(plain_tokenizer_dir), template)
    _, response = sequence(chat, ASK, REPLY)
    assert chat.tokenizer.decode(response) == " Twice. over.</s>"


@pytest.mark.parametrize("conversation", [[*ASK, *REPLY], [SYSTEM, *ASK, *REPLY, *ASK, *REPLY]])
def test_ids_are_those_of_transformers(chat_tokenizer_dir: Path, conversation: Messages) -> None:
    chat = Chat.load(str(chat_tokenizer_dir))
    prompt, response = sequence(chat, conversation[:-1], conversation[-1:])
    whole = chat.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
    newline = chat.encode(pa.array(["\n"]))[0].as_py()
    assert prompt + response + newline == whole
    generation = chat.tokenizer.apply_chat_template(
        conversation[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert prompt == generation


plain = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(st.lists(plain, min_size=1, max_size=5).filter(lambda t: len(t) % 2 == 1), plain, st.booleans(), st.data())
def test_a_prompt_is_a_strict_prefix_and_control_tokens_come_from_the_template_alone(
    chat_tokenizer_dir: Path,
    plain_tokenizer_dir: Path,
    texts: list[str],
    answer: str,
    system: bool,
    data: st.DataObject,
) -> None:
    template = data.draw(st.sampled_from(["hh", "own"]))
    chat = load(chat_tokenizer_dir, None) if template == "own" else load(plain_tokenizer_dir, template)
    prompt = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    prompt = [SYSTEM, *prompt] if system else prompt
    if not answer.strip() or any(token in text for token in chat.control_tokens for text in (*texts, answer)):
        return
    ids, response = sequence(chat, prompt, [{"role": "assistant", "content": answer}])
    control = {chat.tokenizer.convert_tokens_to_ids(token) for token in chat.control_tokens}
    assert [i for i in response if i in control] == [chat.end_of_turn_id]
    assert response[-1] == chat.end_of_turn_id
    assert len(response) >= 2
    turns = len(prompt)
    assert sum(i in control for i in ids) == (2 * turns + 1 if template == "own" else 1)
    decoded = chat.tokenizer.decode(response[:-1], clean_up_tokenization_spaces=False)
    assert decoded == (f" {answer}" if template == "hh" else answer)


_loaded: dict[tuple[Path, str | None], Chat] = {}


def load(folder: Path, template: str | None) -> Chat:
    if (folder, template) not in _loaded:
        _loaded[folder, template] = Chat.load(str(folder), template)
    return _loaded[folder, template]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_no_template_at_all(plain_tokenizer_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"^tokenize\.tokenizer: .*no chat template.*chatml, gemma, hh") as caught:
        Chat.load(str(plain_tokenizer_dir))
    assert "\n" not in str(caught.value)


def test_an_unknown_template_name(plain_tokenizer_dir: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^tokenize\.chat_template: 'chatlm' is neither one of alpaca, chatml, .*, zephyr nor a text"
    ):
        Chat.load(str(plain_tokenizer_dir), "chatlm")


def test_a_folder_as_template(plain_tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^tokenize\.chat_template: "):
        Chat.load(str(plain_tokenizer_dir), str(tmp_path))


def test_a_template_that_is_no_text(plain_tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match=r"^tokenize\.chat_template: .*model\.bin"):
        Chat.load(str(plain_tokenizer_dir), str(tmp_path / "model.bin"))


@pytest.mark.parametrize("wreck", ["absent", "empty", "broken"])
def test_no_tokenizer_there(
    chat_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wreck: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tokenizer"
    if wreck == "empty":
        folder.mkdir()
    if wreck == "broken":
        shutil.copytree(chat_tokenizer_dir, folder)
        (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(OrpoError, match=r"^tokenize\.tokenizer: cannot open .*tokenizer") as caught:
        Chat.load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_template_with_a_syntax_error(plain_tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OrpoError, match=r"^tokenize\.chat_template: "):
        Chat.load(str(plain_tokenizer_dir), write_template(tmp_path, "{% for m in messages %}"))


@pytest.mark.parametrize(
    "expression",
    [
        "{{ 1 // 0 }}",
        "{{ 'a' + 1 }}",
        "{{ range(10 ** 9) | list }}",
        "{{ nothing.there }}",
        "{{ 'a' * 10 ** 12 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_goes_wrong(plain_tokenizer_dir: Path, tmp_path: Path, expression: str) -> None:
    with pytest.raises(OrpoError, match=r"^tokenize\.chat_template: ") as caught:
        Chat.load(str(plain_tokenizer_dir), write_template(tmp_path, find_template("hh") + expression))
    assert "\n" not in str(caught.value)


LOOPS = {
    "over numbers": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "over letters": "{% set s = 'a' * 3000 %}{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "by calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_template_that_loops_is_stopped(plain_tokenizer_dir: Path, tmp_path: Path, loop: str) -> None:
    before = sys.gettrace()
    with pytest.raises(OrpoError, match=r"^tokenize\.chat_template: the template is not done after 250,000 steps$"):
        Chat.load(str(plain_tokenizer_dir), write_template(tmp_path, find_template("hh") + LOOPS[loop]))
    assert sys.gettrace() is before


def test_a_template_that_writes_without_end(plain_tokenizer_dir: Path, tmp_path: Path) -> None:
    template = write_template(tmp_path, find_template("hh") + "{% set n = 10 ** 3 %}{{ 'a' * n * n }}")
    with pytest.raises(OrpoError, match=r"^tokenize\.chat_template: the template writes 1,000,\d+ characters for two"):
        Chat.load(str(plain_tokenizer_dir), template)


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{# nothing #}", "does not write the assistant's answer"),
        ("{{ messages[0].content }}", "does not write the assistant's answer"),
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "writes nothing for the"),
        ("{% for m in messages %}{{ m.content if m.role != 'user' else 'Q' }}{% endfor %}", "does not write the user"),
    ],
)
def test_a_template_that_leaves_something_out(
    plain_tokenizer_dir: Path, tmp_path: Path, template: str, line: str
) -> None:
    with pytest.raises(OrpoError, match=rf"^tokenize\.chat_template: the template {line}") as caught:
        Chat.load(str(plain_tokenizer_dir), write_template(tmp_path, template))
    assert "\n" not in str(caught.value)


NOT_A_PREFIX = {
    "counts the messages": "{{ messages|length }}{% for m in messages %} {{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}",
    "newest first": "{% for m in messages|reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "another header for generation": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}",
}


@pytest.mark.parametrize("case", NOT_A_PREFIX)
def test_a_template_that_does_not_keep_the_prompt_as_prefix(
    plain_tokenizer_dir: Path, tmp_path: Path, case: str
) -> None:
    with pytest.raises(
        OrpoError, match=r"^tokenize\.chat_template: .*does not keep the rendered prompt as a prefix"
    ) as e:
        sequence(Chat.load(str(plain_tokenizer_dir), write_template(tmp_path, NOT_A_PREFIX[case])), ASK, REPLY)
    assert "\n" not in str(e.value)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ' ~ 'OWNED') }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ messages.append(messages[0]) }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(
    plain_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, escape: str
) -> None:
    monkeypatch.chdir(tmp_path)
    template = write_template(tmp_path, find_template("hh") + escape)
    with pytest.raises(OrpoError, match=r"^tokenize\.chat_template: ") as caught:
        Chat.load(str(plain_tokenizer_dir), template)
    assert "unsafe" in str(caught.value) or "undefined" in str(caught.value)
    assert not (tmp_path / "OWNED").exists()


def test_remote_code_is_not_run(chat_tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(chat_tokenizer_dir, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'OWNED')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        Chat.load(str(folder))
    except OrpoError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is sound, running the code is not
    assert not (tmp_path / "OWNED").exists()


# --- the fingerprint -------------------------------------------------------------------------------------------------


def altered(source: Path, target: Path, file: str, change: Callable[[Any], None]) -> Path:
    shutil.copytree(source, target)
    document = json.loads((target / file).read_text())
    change(document)
    (target / file).write_text(json.dumps(document))
    return target


def test_the_fingerprint_covers_contents_not_places(chat_tokenizer_dir: Path, tmp_path: Path) -> None:
    own = Chat.load(str(chat_tokenizer_dir)).fingerprint
    shutil.copytree(chat_tokenizer_dir, tmp_path / "elsewhere")
    assert Chat.load(str(tmp_path / "elsewhere")).fingerprint == own
    assert Chat.load(str(chat_tokenizer_dir), "chatml").fingerprint == own  # the same text by another way
    merges = altered(chat_tokenizer_dir, tmp_path / "merges", "tokenizer.json", lambda d: d["model"]["merges"].pop())
    others = {
        Chat.load(str(merges)).fingerprint,
        Chat.load(str(chat_tokenizer_dir), "hh").fingerprint,
        Chat.load(str(chat_tokenizer_dir), write_template(tmp_path, find_template("chatml") + " ")).fingerprint,
    }
    assert len(others | {own}) == 4


def test_the_fingerprint_outlives_use(chat_tokenizer_dir: Path) -> None:
    used, fresh = Chat.load(str(chat_tokenizer_dir)), Chat.load(str(chat_tokenizer_dir))
    sequence(used, ASK, REPLY)
    used.encode(pa.array(["a " * 5000]))
    assert used.fingerprint == fresh.fingerprint
