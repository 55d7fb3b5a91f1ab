"""Anyone's preference pairs: a prompt, a better and a worse answer, in the forms that are common on the hub.

- prompt, chosen, rejected as strings;
- each as messages, {"role", "content"} or ShareGPT's {"from", "value"}, a list of them or a single one;
- the prompt inside chosen and rejected, with a `prompt` column beside them (H4, argilla) or without (TRL's implicit
  prompt);
- `conversations` as the prompt, with `system` beside it (LLaMA-Factory).
"""

from collections.abc import Mapping
from typing import Any

from orpo_data.schema import PAIRS
from orpo_data.sources.record import Record, Turn, Unparsable, column_list, excerpt, json_name, split_turns, text

SCHEMA = PAIRS
EXCLUDE: tuple[str, ...] = ()
COLUMNS = {
    "prompt": ("prompt", "conversations"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "system": ("system",),
    "score_chosen": ("score_chosen", "chosen-rating", "chosen_score", "metadata.score_chosen"),
    "score_rejected": ("score_rejected", "rejected-rating", "rejected_score", "metadata.score_rejected"),
    "model_chosen": ("model_chosen", "chosen-model", "chosen_model"),
    "model_rejected": ("model_rejected", "rejected-model", "rejected_model"),
    "subset": ("subset",),
}

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}


def parse(record: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """The content columns of a PAIRS row; raises Unparsable."""
    fields = Record(record, columns, COLUMNS)
    shared, chosen, rejected = split_turns(
        turns(fields.require("chosen"), "assistant", "chosen"),
        turns(fields.require("rejected"), "assistant", "rejected"),
    )
    if not _whole(shared or chosen, shared or rejected):  # the sides are answers: what they answer stands elsewhere
        shared = turns(fields.require("prompt"), "user", "prompt") + shared
    return {
        "prompt": _with_system(shared, fields.optional_text("system")),
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": fields.optional_number("score_chosen"),
        "score_rejected": fields.optional_number("score_rejected"),
        "model_chosen": fields.optional_text("model_chosen"),
        "model_rejected": fields.optional_text("model_rejected"),
        "system_chosen": None,
        "system_rejected": None,
        "subset": fields.optional_text("subset"),
    }


def turns(value: Any, role: str, where: str) -> list[Turn]:
    """The messages of one column; a bare string is one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [_turn(value, where)]
    if isinstance(value, list):
        return [_turn(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise Unparsable(f"{where} is {json_name(value)}, neither a string nor messages")


def _turn(value: Any, where: str) -> Turn:
    if not isinstance(value, dict):
        raise Unparsable(f"{where} is {json_name(value)}, not a message")
    role, content = ("role", "content") if "role" in value else ("from", "value")
    if role not in value:
        raise Unparsable(f"{where} has neither 'role' nor 'from', found: {column_list(value)}")
    name = text(value[role], f"{where}.{role}")
    if name.lower() not in ROLES:
        raise Unparsable(f"{where}.{role} is {excerpt(name)}, none of {', '.join(ROLES)}")
    return {"role": ROLES[name.lower()], "content": text(value.get(content), f"{where}.{content}")}


def _whole(chosen: list[Turn], rejected: list[Turn]) -> bool:
    """Whether both sides are conversations from their first turn, not just answers."""
    return all(side and side[0]["role"] != "assistant" for side in (chosen, rejected))


def _with_system(prompt: list[Turn], system: str | None) -> list[Turn]:
    """`system` goes first unless the prompt brings a system message of its own."""
    if not system or (prompt and prompt[0]["role"] == "system"):
        return prompt
    return [{"role": "system", "content": system}, *prompt]
