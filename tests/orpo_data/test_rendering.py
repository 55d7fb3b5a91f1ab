"""Templates run with open contents: what they write holds for all contents, or they are seen to look into them."""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.chat import CONTROL_TOKENS, Chat, template_names
from orpo_data.errors import OrpoError
from orpo_data.layout import Layout, Part, Roles, Slot, between, fill, merged
from orpo_data.rendering import Renderer, Text

ASK, TALK = ("user",), ("user", "assistant", "user")
ORDINARY = [(*system, *turns) for system in ((), ("system",)) for turns in (ASK, TALK, (*TALK, "assistant", "user"))]

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""  # SmolLM2-135M-Instruct's own

CLEAN = {
    "joined by a tilde": "{{ m.role ~ ': ' ~ m.content ~ '!' }}",
    "a filter": "{{ m['content'] | trim }}.",
    "a method": "[{{ m.content.strip() }}]",
    "one side": "[{{ m.content.rstrip() }}|{{ m.content.lstrip() }}]",
    "stripped with what stands before it": "{{ (' : ' + m.content + ' ') | trim }};",
    "stripped with what stands behind it": "{{ (m.content + ' ;\n').rstrip() }}",
    "two in one": "{{ (m.content + messages[0].content).strip() }};",
    "caught in a block": "{% set text %}  {{ m.content }} {% endset %}{{ text | trim }}!",
    "caught in a filter block": "{% filter trim %} {{ m.content }} {% endfilter %}.",
    "a macro": "{% macro say(text) %} {{ text }}{% endmacro %}{{ say(m.content).lstrip() }};",
    "a namespace": "{% set ns = namespace(text='') %}{% set ns.text = ns.text + m.content %}{{ ns.text }};",
    "asked whether it is empty": "{% if m.content %}{{ m.content }}{% else %}nothing{% endif %};",
    "asked whether it is blank": "{{ m.content | trim or 'nothing' }};",
    "empty after all": "{{ m.content | default('nothing', true) }};",
    "asked for its kind": "{% if m.content is string %}{{ m.content | string }};{% endif %}{{ m.content is mapping }}",
    "asked for its presence": "{% if m.content is defined and m.content is not none %}{{ m.content }};{% endif %}",
    "the generation tag": "{% generation %}{{ m.content }}{% endgeneration %};",
    "chosen by place": "{{ m.content if not loop.first else '#' + m.content }}{{ loop.index }};",
    "other keys": "{% if 'tool_calls' in m or m.tools %}{{ m.content | tojson }}{% endif %}{{ m.content }};",
    "jumps": "{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.content }};",
    "roles counted": "{{ messages[: loop.index] | map(attribute='role') | unique | list | length }}{{ m.content }};",
}
CURIOUS = {
    "search": "{% if '</think>' in m.content %}!{% endif %}",
    "comparison": "{% if m.content == 'Yes.' %}!{% endif %}",
    "another comparison": "{% if 'Yes.' != m.content %}!{% endif %}",
    "order": "{% if m.content < 'b' %}!{% endif %}",
    "length": "{{ m.content | length }}",
    "upper": "{{ m.content.upper() }}",
    "title": "{{ m.content | title }}",
    "split": "{{ m.content.split('</think>')[-1] }}",
    "replace": "{{ m.content | replace('a', 'b') }}",
    "letters": "{% for letter in m.content %}.{% endfor %}",
    "a letter": "{{ m.content[0] }}",
    "repetition": "{{ m.content * 2 }}",
    "a number": "{{ m.content | int }}",
    "a fraction": "{{ m.content | float }}",
    "percent": "{{ '%s' % m.content }}",
    "a slice": "{{ m.content[:3] }}",
    "a letter inside a format": "{{ '{0[0]}'.format(m.content) }}",
    "percent without a place": "{{ 'a' % m.content }}",
    "format": "{{ '{}'.format(m.content) }}",
    "json": "{{ m.content | tojson }}",
    "json of all": "{{ messages | tojson }}",
    "all as text": "{{ messages | string }}",
    "a message as text": "{{ m }}",
    "all joined": "{{ messages | map(attribute='content') | join(',') }}",
    "mapped": "{{ messages | map(attribute='content') | map('upper') | first }}",
    "selected": "{{ messages | selectattr('content', 'equalto', 'a') | list | length }}",
    "sorted": "{{ (messages | sort(attribute='content') | first).role }}",
    "lower": "{% if m.content is lower %}!{% endif %}",
    "in a list": "{% if m.content in ['a', 'b'] %}!{% endif %}",
    "in a list, as a test": "{% if m.content is in ['a', 'b'] %}!{% endif %}",
    "a key": "{{ {m.content: 1} | length }}",
    "looked up": "{{ {'a': 1}[m.content] }}",
    "looked up in a loop": "{{ loop[m.content] }}",
    "counted": "{{ 'abcabc'.count(m.content) }}",
    "changed": "{{ loop.changed(m.content) }}",
    "escaped": "{{ m.content | e }}",
    "stripped of letters": "{{ m.content.strip('ab') }}",
    "trimmed of letters": "{{ m.content | trim('ab') }}",
    "seen through a block": "{% set text %}{{ m.content }}{% endset %}{% if 'a' in text %}!{% endif %}",
    "seen through a tilde": "{% if 'a' in (m.content ~ '') %}!{% endif %}",
    "seen through a macro": "{% macro say(t) %}{{ t }}{% endmacro %}{% if say(m.content) == 'a' %}!{% endif %}",
    "chance": "{{ [1, 1] | random }}",
    "idle text": "{{ lipsum(1, false) }}",
}


def frame(what: str) -> str:
    """A template that writes `what` of every message `m`."""
    return "{% for m in messages %}<" + what + ">{% endfor %}{% if add_generation_prompt %}<{% endif %}"


def layout_of(template: str, prompt: Roles = TALK, after: str = "", **variables: Any) -> Layout | None:
    return Renderer(template, variables).layout(prompt, ("assistant",), after, "")


@pytest.fixture(scope="session")
def every_token_dir(tmp_path_factory: pytest.TempPathFactory, plain_tokenizer_dir: Path) -> Path:
    """A tokenizer that knows the control tokens of every named template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain_tokenizer_dir)
    tokens = sorted({token for tokens in CONTROL_TOKENS.values() for token in tokens})
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": tokens})
    folder = tmp_path_factory.mktemp("every-token")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load(every_token_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Chat]:
    """A Chat by the name or the text of its template."""

    def open_chat(template: str) -> Chat:
        if template in template_names():
            return Chat.load(str(every_token_dir), template)
        file = tmp_path_factory.mktemp("own") / "own.jinja"
        file.write_text(template)
        return Chat.load(str(every_token_dir), str(file))

    return cache(open_chat)


def rendered(chat: Chat, messages: list[dict[str, str]], prompt: int) -> tuple[str, str] | None:
    """Prompt and answer as the template itself writes them; None where it refuses."""
    try:
        text = chat.render_prompt(messages[:prompt])
        return text, chat.render_answer(messages[:prompt], text, messages[prompt:])
    except (jinja2.TemplateError, OrpoError):
        return None


# --- text with slots --------------------------------------------------------------------------------------------------

words = st.sampled_from(["", " ", "\n\x1c", "a", " b", "c "])
open_texts = st.lists(
    st.sampled_from([" ", "x", " y\n", Slot(0), Slot(1), Slot(1, right=True)]), min_size=1, max_size=4
)
AS_STR: dict[str, Callable[[Any], Any]] = {
    "strip": lambda text: text.strip(),
    "lstrip": lambda text: text.lstrip(),
    "rstrip": lambda text: text.rstrip(),
    "both": lambda text: text.rstrip().lstrip(),
    "before": lambda text: "x " + text,
    "behind": lambda text: text + " x",
    "twice": lambda text: text + text,
    "empty": lambda text: bool(text),
}


@given(
    open_texts.filter(lambda parts: any(isinstance(part, Slot) for part in parts)),
    st.lists(st.sampled_from(sorted(AS_STR)), min_size=1, max_size=3),
    st.tuples(words, words),
)
def test_a_text_does_as_its_str(parts: list[Part], names: list[str], contents: tuple[str, str]) -> None:
    filled: set[int] = set()
    text, plain = Text(merged(parts), filled), fill(merged(parts), contents)
    for name in names:
        if not isinstance(plain, bool):
            text, plain = AS_STR[name](text), AS_STR[name](plain)
    if all(contents[i].strip() for i in filled):
        assert (fill(text.parts, contents) if isinstance(text, Text) else text) == plain


# --- what can be seen through ----------------------------------------------------------------------------------------


def test_a_layout_by_hand() -> None:
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content | trim }};\n{% endfor %}"
    layout = layout_of(template + "{% if add_generation_prompt %}assistant\n{% endif %}", ASK, ";\n")
    assert layout == Layout(
        prompt=("user\n", Slot(0, left=True, right=True), ";\nassistant\n"),
        answer=(Slot(1, left=True, right=True),),
        filled=frozenset({1}),
    )
    assert fill(layout.prompt, [" a\n", "b"]) == "user\na;\nassistant\n"


@pytest.mark.parametrize("template", [*template_names(), SMOLLM2], ids=lambda t: t if len(t) < 20 else "smollm2")
def test_ordinary_conversations_have_a_layout(load: Callable[[str], Chat], template: str) -> None:
    for roles in ORDINARY:
        layout = load(template).layout(roles, ("assistant",))
        assert layout is not None
        assert [p.message for p in layout.prompt if isinstance(p, Slot)] == list(range(len(roles)))
        assert [p.message for p in layout.answer if isinstance(p, Slot)] == [len(roles)]
        assert layout.filled <= {1, len(roles)}  # Llama 2 strips the first question together with the system message


@pytest.mark.parametrize("case", CLEAN)
def test_what_a_template_may_do(case: str) -> None:
    assert layout_of(frame(CLEAN[case])) is not None


@pytest.mark.parametrize("case", CURIOUS)
def test_what_a_template_may_not_do(case: str) -> None:
    assert layout_of(frame("{{ m.content }};")) is not None
    assert layout_of(frame("{{ m.content }};" + CURIOUS[case])) is None


pieces = [
    "<|im_end|>",
    "<s>",
    "</s>",
    "[INST]",
    "</think>",
    "a",
    "Yes.",
    " ",
    "\n",
    "\x1c",
    "\xa0",
    "\u2003",
    "\0",
    "é",
    "{{ 1 }}",
]
contents = st.lists(st.sampled_from(pieces), max_size=4).map("".join) | st.text(max_size=8)
roles = st.sampled_from(["user", "assistant", "system", "tool", "", "<s>"])
messages = st.fixed_dictionaries({"role": roles, "content": contents})
usual = st.lists(contents, min_size=2, max_size=5).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
conversations = (
    usual
    | usual.map(lambda m: [{"role": "system", "content": "Be brief. "}, *m])
    | st.lists(messages, min_size=2, max_size=5)
)
templates = [*template_names(), SMOLLM2, *map(frame, CLEAN.values())]


@given(st.sampled_from(templates), conversations, st.data())
def test_a_filled_layout_is_what_the_template_writes(
    load: Callable[[str], Chat], template: str, talk: list[dict[str, str]], data: st.DataObject
) -> None:
    chat = load(template)
    prompt = data.draw(st.integers(1, len(talk) - 1))
    names, texts = tuple(m["role"] for m in talk), [m["content"] for m in talk]
    layout = chat.layout(names[:prompt], names[prompt:])
    if layout and all(texts[i].strip() for i in layout.filled):
        assert rendered(chat, talk, prompt) == (fill(layout.prompt, texts), fill(layout.answer, texts))


WITH_BRACES = [{"role": "user", "content": "{{ 1 }}"}, {"role": "assistant", "content": "{:>9999}"}]
asking = [frame(CURIOUS[case] + "{{ m.content }};") for case in CURIOUS if case not in ("chance", "idle text")]


@given(template=st.sampled_from([*asking, *templates]), talk=conversations, prompt=st.booleans())
@example(template=frame(CURIOUS["a letter inside a format"]), talk=WITH_BRACES, prompt=False)
def test_each_conversation_is_rendered_as_by_transformers(
    load: Callable[[str], Chat], template: str, talk: list[dict[str, str]], prompt: bool
) -> None:
    """Or refused by both."""
    told = []
    for reference in (False, True):
        try:
            told.append(load(template)._render(talk, prompt, reference))
        except jinja2.TemplateError:
            told.append("")
        except OrpoError:  # the template cannot be opened at all
            return
    assert told[0] == told[1]


@given(st.sampled_from(templates), usual)
def test_a_prompt_by_its_layout(load: Callable[[str], Chat], template: str, talk: list[dict[str, str]]) -> None:
    try:
        expected = load(template).render_prompt(talk)
    except jinja2.TemplateError:
        expected = None
    if expected is not None:
        assert load(template).write_prompt(talk) == expected


def test_a_template_that_refuses_roles_has_no_layout_for_them(load: Callable[[str], Chat]) -> None:
    assert load("gemma").layout(("system",), ("assistant",)) is None
    assert load("gemma").layout(("system", "user"), ("assistant",)) is not None


DATED = (
    "{% set date = strftime_now('%H:%M:%S') if strftime_now is defined else '26 Jul 2024' %}"
    "{{ date }}\n{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_layout_with_the_time_holds_for_a_second(
    load: Callable[[str], Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama 3's own templates, whose system message has the date."""
    chat, now = load(DATED), 1_000_000
    monkeypatch.setattr("orpo_data.chat.time", SimpleNamespace(time=lambda: now))
    stopped = SimpleNamespace(now=lambda: datetime.fromtimestamp(now, UTC))
    for module in ("orpo_data.rendering", "transformers.utils.chat_template_utils"):
        monkeypatch.setattr(f"{module}.datetime", stopped)
    first, again = chat.layout(ASK, ("assistant",)), chat.layout(ASK, ("assistant",))
    assert first is again
    assert first is not None
    assert fill(first.prompt, [" So? "]) == "13:46:40\nuser: So?\nassistant: "
    now += 1
    assert fill(chat.layout(ASK, ("assistant",)).prompt, ["So?"]) == "13:46:41\nuser: So?\nassistant: "


def test_a_layout_that_the_template_does_not_write_is_none(
    load: Callable[[str], Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should this jinja ever differ from that of transformers, rows are rendered one by one."""
    chat = load("zephyr")
    layout = chat._find_layout(ASK, ("assistant",))
    assert layout is not None
    wrong = Layout(("!", *layout.prompt), layout.answer, layout.filled)
    monkeypatch.setattr(Renderer, "layout", lambda *arguments: wrong)
    assert chat._find_layout(ASK, ("assistant",)) is None


# --- the part between the prompt and the end --------------------------------------------------------------------------

A, B = Slot(0), Slot(1)


@pytest.mark.parametrize(
    ("head", "whole", "after", "part"),
    [
        ((A, "x"), (A, "xy", B, "z"), "z", ("y", B)),
        ((A, "x"), (A, "x", B, "yz"), "z", (B, "y")),
        ((A, "x"), (A, "xyz"), "z", ("y",)),
        ((A, "x"), (A, "xyz"), "yz", ()),
        ((A, "xy"), (A, "xyz"), "yz", None),  # they overlap
        ((A,), (A, B), "", (B,)),
        ((A,), (A, B), "z", None),
        ((A, "x"), (A, "y", B), "", None),
        ((A, "x"), (B, "x", B), "", None),
        ((A, "x"), (A,), "", None),
        ((A, "x", B), (A, "xy"), "", None),
        ((), ("x", A), "", None),
    ],
)
def test_the_part_between(head: Any, whole: Any, after: str, part: Any) -> None:
    assert between(head, whole, after) == part
