"""A tokenizer together with the chat template that turns messages into its text.

The template is the tokenizer's own, one of the named ones in chat_templates/, or a jinja file; transformers renders it
in jinja's sandbox. Nothing here depends on a file's name or time: `fingerprint` covers contents only.
"""

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]

TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"
_PROBE_QUESTION = "Which colour does the evening sky have?"
_PROBE_ANSWER = "Crimson, mostly."


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


class Chat:
    """Renders and encodes conversations so that a prompt's ids are a strict prefix of every answer's sequence."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", template: str | None = None) -> None:
        self.tokenizer = tokenizer
        template = template or tokenizer.chat_template
        if not template:
            raise UsageError(
                f"tokenize.tokenizer: {tokenizer.name_or_path!r} has no chat template of its own; set "
                f"tokenize.chat_template to one of {', '.join(template_names())} or to a jinja file"
            )
        self.template: str = template
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._after_answer, self._answer_tail, self.end_of_turn_id = self._probe_end_of_turn()
        self.bos_id = self._probe_bos()

    @classmethod
    def load(cls, tokenizer: str, chat_template: str | None = None, revision: str | None = None) -> "Chat":
        """Open a tokenizer from a local folder or the hub; OrpoError in one line when that fails."""
        from transformers import AutoTokenizer

        template = find_template(chat_template) if chat_template else None
        # a model's length limit is not ours: its warning about long inputs would only mislead
        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        try:
            loaded: Any = AutoTokenizer.from_pretrained(tokenizer, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OrpoError(f"tokenize.tokenizer: cannot open {tokenizer!r}: {reason}") from None
        if not hasattr(loaded, "backend_tokenizer"):
            raise OrpoError(f"tokenize.tokenizer: {tokenizer!r} has no tokenizer.json (a fast tokenizer is needed)")
        return cls(loaded, template)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids: vocabulary, merges, special tokens, template text."""
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        return digest([self._backend.to_str(), special, self.template])

    @cached_property
    def control_tokens(self) -> list[str]:
        """Texts that the tokenizer would read as control tokens wherever they stand."""
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted({token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens))

    def render_prompt(self, prompt: Messages) -> str:
        """The conversation up to and including the assistant's header."""
        return self._render(prompt, add_generation_prompt=True)

    def render_answer(self, prompt: Messages, prompt_text: str, answer: Messages) -> str:
        """What the assistant writes after `prompt_text`, without its end of turn."""
        full = self._render([*prompt, *answer], add_generation_prompt=False)
        if not (full.startswith(prompt_text) and full.endswith(self._after_answer)):
            raise OrpoError(
                "tokenize.chat_template: the template does not keep the rendered prompt as a prefix of prompt + "
                f"answer (the prompt ends in {prompt_text[-40:]!r}, the whole has {full[: len(prompt_text)][-40:]!r})"
            )
        return full[len(prompt_text) : len(full) - len(self._after_answer)] + self._answer_tail

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, nothing added; a batch uses every core."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered prompts, with the tokenizer's own start token once."""
        start = [] if self.bos_id is None else [self.bos_id]
        return [start + ids for ids in self.encode(texts)]

    def encode_answers(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered answers, each with one end of turn."""
        return [[*ids, self.end_of_turn_id] for ids in self.encode(texts)]

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Raises jinja2.TemplateError, also for what the template's own expressions do wrong (1 / 0, "a" + 1)."""
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise jinja2.TemplateRuntimeError(str(error)) from error
        return str(text)

    def _probe_end_of_turn(self) -> tuple[str, str, int]:
        """What the template writes after an answer: all of it, what of it belongs to the answer, and the token's id."""
        messages = [{"role": "user", "content": _PROBE_QUESTION}, {"role": "assistant", "content": _PROBE_ANSWER}]
        try:
            full = self._render(messages, add_generation_prompt=False)
        except jinja2.TemplateError as error:
            raise OrpoError(f"tokenize.chat_template: {error}") from None
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

    def _probe_bos(self) -> int | None:
        """The start token to put before a prompt, if the tokenizer uses one and the template does not write it."""
        bos = self.tokenizer.bos_token_id
        if bos is None or self._backend.encode(_PROBE_QUESTION).ids[:1] != [bos]:
            return None
        prompt = self.render_prompt([{"role": "user", "content": _PROBE_QUESTION}])
        return None if self.encode([prompt])[0][:1] == [bos] else int(bos)
