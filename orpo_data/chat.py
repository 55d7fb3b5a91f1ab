"""A tokenizer together with the chat template that turns messages into its text.

The template is the tokenizer's own, one of the named ones in chat_templates/, or a jinja file. It runs in jinja's
sandbox, within limits, and is compared with what transformers renders. Nothing here depends on a file's name or time:
`fingerprint` covers contents only.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orpo_data.encoding import Encoder
from orpo_data.errors import OrpoError, UsageError
from orpo_data.layout import Layout, Roles, fill
from orpo_data.manifest import digest
from orpo_data.process import few_full_collections
from orpo_data.ragged import as_bytes, as_lists, join, lengths, split
from orpo_data.rendering import TEMPLATE_ERRORS, Renderer
from orpo_data.template_limits import step_limit
from orpo_data.tokenizer_files import TELLS_THE_TIME, model_of, tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]

TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"

CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
"""What a named template writes that must be one token each. The others are plain text and take any tokenizer."""

TURN_LABELS = (
    *("\n\nHuman:", "\n\nAssistant:", "### Instruction:", "### Response:", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>", "<s>", "</s>", "<|endoftext|>"),
)
"""What begins or ends a turn in some template's text; it counts where the template at hand writes it."""

_PROBE_QUESTION = "Which colour does the evening sky have?"
_PROBE_ANSWER = "Crimson, mostly."
_PROBE = [{"role": "user", "content": _PROBE_QUESTION}, {"role": "assistant", "content": _PROBE_ANSWER}]
_PROBE_CHARACTERS = 100_000

_MOST_LAYOUTS = 10_000  # in memory; sequences of roles are few, unless someone means them to be many


def template_names() -> list[str]:
    return sorted(file.stem for file in TEMPLATE_FOLDER.glob("*.jinja"))


def find_template(name_or_path: str) -> str:
    """The text of a template given by name or as a jinja file."""
    if name_or_path in template_names():
        return (TEMPLATE_FOLDER / f"{name_or_path}.jinja").read_text()
    try:
        return Path(name_or_path).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            f"tokenize.chat_template: {name_or_path!r} is neither one of {', '.join(template_names())} nor a text file"
        ) from None


def _own_template(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The one called default where a tokenizer has several, as transformers takes it; UsageError if there is none."""
    own = tokenizer.chat_template
    found = own.get("default") if isinstance(own, dict) else own
    if not found:
        has = f"no chat template called default, only {', '.join(own)}" if own else "no chat template of its own"
        raise UsageError(
            f"tokenize.tokenizer: {tokenizer.name_or_path!r} has {has}; set tokenize.chat_template to one of "
            f"{', '.join(template_names())} or to a jinja file"
        )
    return str(found)


class Chat:
    """Renders and encodes conversations so that a prompt's ids are a strict prefix of every answer's sequence."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", template: str | None = None, own_tokens: Sequence[str] = ()
    ) -> None:
        """`own_tokens` are the template's control tokens, whether or not the tokenizer calls them special."""
        self.tokenizer = tokenizer
        self.control_tokens = _control_tokens(tokenizer, own_tokens)
        self.template: str = template or _own_template(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._encoder = Encoder(self._backend)
        self._renderer = Renderer(self.template, tokenizer.special_tokens_map)
        self._layouts: dict[tuple[Roles, Roles, int], Layout | None] = {}
        self._finding = Lock()
        self._try_out()
        self._after_answer, self._answer_tail, self.end_of_turn_id = self._probe_end_of_turn()
        header = self._probe_header()
        self._probe_answer()
        self._header = self._probe_prefix_space(header)
        self.bos_id = self._probe_bos()

    @classmethod
    def load(cls, tokenizer: str, chat_template: str | None = None, revision: str | None = None) -> "Chat":
        """Open a tokenizer from a local folder or the hub; OrpoError in one line when that fails."""
        template = find_template(chat_template) if chat_template else None
        # a model's length limit is not ours: its warning about long inputs would only mislead
        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        try:
            with few_full_collections:
                from transformers import AutoTokenizer  # imports torch

                config = model_of(tokenizer, tokenizer_folder(tokenizer, revision))
                loaded: Any = AutoTokenizer.from_pretrained(
                    tokenizer, revision=revision, config=config, trust_remote_code=False
                )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OrpoError(f"tokenize.tokenizer: cannot open {tokenizer!r}: {reason}") from None
        if not hasattr(loaded, "backend_tokenizer"):
            raise OrpoError(f"tokenize.tokenizer: {tokenizer!r} has no tokenizer.json (a fast tokenizer is needed)")
        own_tokens = CONTROL_TOKENS.get(chat_template or "", ())
        if missing := [token for token in own_tokens if not _is_token(loaded, token)]:
            plain = [name for name in template_names() if name not in CONTROL_TOKENS]
            raise UsageError(
                f"tokenize.chat_template: {chat_template!r} writes {missing[0]!r}, which is no token of {tokenizer!r}; "
                f"take a tokenizer that has it, or a template in plain text ({', '.join(plain)})"
            )
        return cls(loaded, template, own_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids: vocabulary, merges, special tokens, template text."""
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        return digest([self._backend.to_str(), special, self.template])

    @property
    def tells_the_time(self) -> bool:
        """Whether the template may write the same messages differently a second later."""
        return TELLS_THE_TIME in self.template

    @cached_property
    def turn_labels(self) -> list[str]:
        """Texts that begin or end a turn where this template writes them."""
        turns = [{"role": role, "content": "-"} for role in ("user", "assistant", "user", "assistant")]
        written = ""
        for messages in (turns, [{"role": "system", "content": "-"}, *turns]):
            with suppress(jinja2.TemplateError):
                written += self._render(messages, add_generation_prompt=False)
        return [label for label in TURN_LABELS if label in written]

    def render_prompt(self, prompt: Messages, *, reference: bool = False) -> str:
        """The conversation up to and including the assistant's header; jinja2.TemplateError if there is none.

        As `reference` transformers renders it, whose limits cost much time.
        """
        text = self._render(prompt, True, reference)
        if not text:
            raise jinja2.TemplateRuntimeError("the template writes nothing for the prompt")
        return text

    def render_answer(self, prompt: Messages, prompt_text: str, answer: Messages, *, reference: bool = False) -> str:
        """What the assistant writes after `prompt_text`, without its end of turn; jinja2.TemplateError if nothing."""
        full = self._render([*prompt, *answer], False, reference)
        if not (full.startswith(prompt_text) and full.endswith(self._after_answer)):
            raise jinja2.TemplateRuntimeError(
                "the template does not keep the rendered prompt as a prefix of prompt + answer (the prompt ends in "
                f"{prompt_text[-40:]!r}, the whole has {full[: len(prompt_text)][-40:]!r})"
            )
        text = full[len(prompt_text) : len(full) - len(self._after_answer)]
        if not text.strip():
            raise jinja2.TemplateRuntimeError("the template leaves nothing of an answer")
        return text + self._answer_tail

    def layout(self, prompt: Roles, answer: Roles) -> Layout | None:
        """What the template writes for these roles, where that does not depend on what the messages say."""
        second = int(time.time()) if self.tells_the_time else 0  # such a layout holds for a second
        with self._finding:  # threads meet the same roles at the same time, and to find a layout takes long
            if (prompt, answer, second) not in self._layouts:
                if len(self._layouts) >= _MOST_LAYOUTS:
                    self._layouts.clear()
                self._layouts[prompt, answer, second] = self._find_layout(prompt, answer)
            return self._layouts[prompt, answer, second]

    def _find_layout(self, prompt: Roles, answer: Roles) -> Layout | None:
        """A layout that has been compared with what transformers renders."""
        layout = self._renderer.layout(prompt, answer, self._after_answer, self._answer_tail)
        if layout is None:
            return None
        contents = [f" {i} {_PROBE_ANSWER}\n" for i in range(len(prompt + answer))]
        messages = [{"role": r, "content": c} for r, c in zip(prompt + answer, contents, strict=True)]
        asked, said = messages[: len(prompt)], messages[len(prompt) :]
        try:
            prompt_text = self.render_prompt(asked, reference=True)
            texts = prompt_text, self.render_answer(asked, prompt_text, said, reference=True)
        except jinja2.TemplateError:
            return None
        return layout if texts == (fill(layout.prompt, contents), fill(layout.answer, contents)) else None

    def write_prompt(self, prompt: Messages) -> str:
        """`render_prompt`, by a layout where there is one."""
        roles, contents = tuple(m["role"] for m in prompt), [m["content"] for m in prompt]
        layout = self.layout(roles, ("assistant",)) if None not in (*roles, *contents) else None
        if layout and all(contents[i].strip() for i in layout.filled if i < len(contents)):
            return fill(layout.prompt, contents)
        return self.render_prompt(prompt)

    def encode(self, texts: pa.StringArray) -> pa.ListArray:
        """Token ids of each text, nothing added."""
        return self._encoder.encode(texts)

    def encode_pairs(
        self, prompts: pa.StringArray, chosen: pa.StringArray, rejected: pa.StringArray
    ) -> tuple[pa.ListArray, pa.ListArray, pa.ListArray]:
        """`encode_prompts` of the prompts and `encode_answers` of both sides."""
        if self._header:  # such a tokenizer gets whole texts, and there is nothing to share
            return self.encode_prompts(prompts), self.encode_answers(chosen), self.encode_answers(rejected)
        asked, *answers = self._encoder.encode_all([prompts, chosen, rejected])
        return self._begun(asked), *map(self._ended, answers)

    def encode_prompts(self, texts: pa.StringArray) -> pa.ListArray:
        """Ids of rendered prompts, with the tokenizer's own start token once."""
        return self._begun(self.encode(texts))

    def encode_answers(self, texts: pa.StringArray) -> pa.ListArray:
        """Ids of rendered answers as they are behind the assistant's header, each with one end of turn."""
        return self._ended(self._encode_behind(self._header, texts) if self._header else self.encode(texts))

    def _begun(self, prompts: pa.ListArray) -> pa.ListArray:
        return prompts if self.bos_id is None else join([self.bos_id], prompts)

    def _ended(self, answers: pa.ListArray) -> pa.ListArray:
        return join(answers, [self.end_of_turn_id])

    def _encode_behind(self, header: str, texts: pa.StringArray) -> pa.ListArray:
        """Ids of each text as they are behind `header`.

        A token across the seam is left alone: the prompt's ids must not depend on the answer.
        """
        head, whole = self.encode(pa.array([header])), self.encode(pc.binary_join_element_wise(header, texts, ""))
        first, others = split(whole, np.minimum(lengths(head), lengths(whole)))
        same = pc.equal(as_bytes(first), as_bytes(head)[0])
        return as_lists(pc.if_else(same, as_bytes(others), as_bytes(self.encode(texts))))

    def _render(self, messages: Messages, add_generation_prompt: bool, reference: bool = False) -> str:
        """Raises jinja2.TemplateError, also for what the template's own expressions do wrong (1 / 0, "a" * 10**12)."""
        try:
            if reference:
                return self._render_elsewhere(messages, add_generation_prompt)
            return self._renderer.render(messages, add_generation_prompt=add_generation_prompt)
        except RecursionError:
            raise jinja2.TemplateRuntimeError("the template calls itself without end") from None
        except TEMPLATE_ERRORS as error:
            raise jinja2.TemplateRuntimeError(str(error) or type(error).__name__) from error

    def _render_elsewhere(self, messages: Messages, add_generation_prompt: bool) -> str:
        """By transformers."""
        with step_limit():
            text: Any = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        return str(text)

    def _try_out(self) -> None:
        """OrpoError for a template that has no end or no measure, that fails, or that is not written as elsewhere."""
        for messages in (_PROBE[:1], _PROBE):
            try:
                ours, theirs = (self._render(messages, len(messages) == 1, reference) for reference in (False, True))
            except jinja2.TemplateError as error:
                raise OrpoError(f"tokenize.chat_template: {error}") from None
            if ours != theirs and not self.tells_the_time:
                raise OrpoError(
                    f"tokenize.chat_template: writes {ours[:200]!r} for two lines, by transformers {theirs[:200]!r}"
                )

    def _probe_end_of_turn(self) -> tuple[str, str, int]:
        """What the template writes after an answer: all of it, what of it belongs to the answer, and the token's id."""
        try:
            full = self._render(_PROBE, add_generation_prompt=False)
        except jinja2.TemplateError as error:
            raise OrpoError(f"tokenize.chat_template: {error}") from None
        if len(full) > _PROBE_CHARACTERS:
            raise OrpoError(f"tokenize.chat_template: the template writes {len(full):,} characters for two lines")
        _, found, after = full.rpartition(_PROBE_ANSWER)
        if not found:
            raise OrpoError("tokenize.chat_template: the template does not write the assistant's answer")
        ends = [(after.index(token), token) for token in self.control_tokens if token in after]
        if ends:
            position, token = min(ends, key=lambda end: (end[0], -len(end[1])))
            return after, after[:position], int(self._backend.token_to_id(token))
        if self.tokenizer.eos_token_id is None:
            raise OrpoError("tokenize.tokenizer: neither the template nor the tokenizer has an end-of-turn token")
        return after, "", int(self.tokenizer.eos_token_id)

    def _probe_header(self) -> str:
        """What the template writes between the user's last message and the assistant's answer."""
        try:
            prompt = self.render_prompt(_PROBE[:1])
        except jinja2.TemplateError as error:
            raise OrpoError(f"tokenize.chat_template: {error}") from None
        _, found, header = prompt.rpartition(_PROBE_QUESTION)
        if not found:
            raise OrpoError("tokenize.chat_template: the template does not write the user's message")
        return header

    def _probe_answer(self) -> None:
        """OrpoError if not even an ordinary prompt is a prefix of prompt + answer: no row could be written."""
        try:
            self.render_answer(_PROBE[:1], self.render_prompt(_PROBE[:1]), _PROBE[1:])
        except jinja2.TemplateError as error:
            raise OrpoError(f"tokenize.chat_template: {error}") from None

    def _probe_prefix_space(self, header: str) -> str:
        """`header` if the tokenizer puts a space before the first word of a text, as SentencePiece's do; else ""."""
        head, alone, whole = self.encode(pa.array([header, _PROBE_ANSWER, header + _PROBE_ANSWER])).to_pylist()
        return "" if head + alone == whole else header

    def _probe_bos(self) -> int | None:
        """The start token to put before a prompt, if the tokenizer uses one and the template does not write it."""
        bos = self.tokenizer.bos_token_id
        if bos is None or self._backend.encode(_PROBE_QUESTION).ids[:1] != [bos]:
            return None
        prompt = self.render_prompt(_PROBE[:1])
        return None if self._backend.encode(prompt, add_special_tokens=False).ids[:1] == [bos] else int(bos)


def _control_tokens(tokenizer: "PreTrainedTokenizerFast", own_tokens: Sequence[str]) -> list[str]:
    """Texts that the tokenizer would read as control tokens wherever they stand."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special | set(tokenizer.all_special_tokens) | set(own_tokens))


def _is_token(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer reads `text` as one token of its own."""
    backend = tokenizer.backend_tokenizer
    return bool(backend.encode(text, add_special_tokens=False).ids == [backend.token_to_id(text)])
