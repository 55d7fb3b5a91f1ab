"""Anyone's preference pairs: a prompt, a better and a worse answer, in the forms that are common on the hub.

- prompt, chosen, rejected as strings;
- each as messages, {"role", "content"} or ShareGPT's {"from", "value"}, a list of them or a single one;
- the prompt inside chosen and rejected, with a `prompt` column beside them (H4, argilla) or without (TRL's implicit
  prompt);
- `conversations` as the prompt, with `system` beside it (LLaMA-Factory).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import methodcaller
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_data.schema import PAIRS
from orpo_data.sources.columns import (
    NULL,
    ROLE_NAMES,
    Fields,
    Found,
    Odd,
    Rows,
    Turns,
    Values,
    field,
    get,
    listed,
    not_null,
    numbers,
    of_type,
    split_turns_of_many,
    strings,
    texts,
    to_arrow,
)
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
TEXTS, NUMBERS = ("system", "model_chosen", "model_rejected", "subset"), ("score_chosen", "score_rejected")

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
PLACES = {role: place for place, role in enumerate(ROLE_NAMES)}
CALLS = ("tool_calls", "function_call")  # what a message may hold beside its content


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
    for call in CALLS:
        if value.get(call):
            raise Unparsable(f"{where} has {call!r}, which would be lost")
    return {"role": ROLES[name.lower()], "content": text(value.get(content), f"{where}.{content}")}


def _whole(chosen: list[Turn], rejected: list[Turn]) -> bool:
    """Whether both sides are conversations from their first turn, not just answers."""
    return all(side and side[0]["role"] != "assistant" for side in (chosen, rejected))


def _with_system(prompt: list[Turn], system: str | None) -> list[Turn]:
    """`system` goes first unless the prompt brings a system message of its own."""
    if not system or (prompt and prompt[0]["role"] == "system"):
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def fields(found: Found) -> Fields:
    """What the rows need of many records: a value each, or one for each turn; raises Odd."""
    sides = {
        "chosen": turns_of_many(found.get("chosen"), "assistant", required=True),
        "rejected": turns_of_many(found.get("rejected"), "assistant", required=True),
        "prompt": turns_of_many(found.get("prompt"), "user"),
    }
    return {
        **{f"{side}.{name}": column for side, turns in sides.items() for name, column in turns.items()},
        **{name: found.optional_text(name) for name in TEXTS},
        **{name: found.optional_number(name) for name in NUMBERS},
    }


def rows(fields: Fields) -> Rows:
    """`parse` for many."""
    chosen, rejected, given = (_joined(fields, side) for side in ("chosen", "rejected", "prompt"))
    whole = np.logical_and.reduce([(side.lengths > 0) & ~side.first_is("assistant") for side in (chosen, rejected)])
    prompt, chosen, rejected = split_turns_of_many(chosen, rejected)
    prompt = (given.where(~whole) + prompt).under(texts(fields["system"]))
    sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    columns = {name: side.to_arrow() for name, side in sides.items()}
    columns |= {name: to_arrow(texts(fields[name])) for name in TEXTS if name != "system"}
    columns |= {name: to_arrow(numbers(fields[name])) for name in NUMBERS}
    return Rows(columns, ~whole & (given.lengths == 0))


def turns_of_many(values: Values, role: str, *, required: bool = False) -> Fields:
    """`turns` for many rows, all of one form: strings, lists of messages, or messages; no turns where all are null,
    which they may be unless they are `required`."""
    return (_turns_in_column if isinstance(values, pa.Array) else _turns_in_list)(values, role, required)


def _turns_in_list(values: Sequence[Any], role: str, required: bool) -> Fields:
    kinds = {*map(type, values)}
    if kinds == {str}:
        return {"roles": [PLACES[role]] * len(values), "contents": [*values], "lengths": [1] * len(values)}
    if kinds == {dict} or (kinds == {NULL} and not required):
        values = [[value] if value is not None else [] for value in values]
    elif kinds != {list}:
        raise Odd
    messages = of_type(chain.from_iterable(values), dict)
    if any(message.get(call) for message in messages for call in CALLS):
        raise Odd
    has_role = any(map(methodcaller("__contains__", "role"), messages))
    role_key, content_key = ("role", "content") if has_role else ("from", "value")
    names, contents = (of_type(get(messages, key), str) for key in (role_key, content_key))
    known = _places(names)
    return {"roles": [*map(known.__getitem__, names)], "contents": contents, "lengths": [*map(len, values)]}


def _turns_in_column(values: pa.Array, role: str, required: bool) -> Fields:
    kind, count = values.type, len(values)
    if kind == pa.null() and not required:
        return {"roles": [], "contents": [], "lengths": [0] * count}
    if kind == pa.string():
        return {"roles": [PLACES[role]] * count, "contents": not_null(values), "lengths": [1] * count}
    messages = listed(values)
    if any(field(messages, call).type != pa.null() for call in CALLS):
        raise Odd
    role_key, content_key = ("role", "content") if messages.type.get_field_index("role") >= 0 else ("from", "value")
    names, contents = (strings(field(messages, key)) for key in (role_key, content_key))
    coded = names.dictionary_encode()
    places = pa.array(_places(coded.dictionary.to_pylist()).values(), pa.int64())
    return {"roles": places.take(coded.indices), "contents": contents, "lengths": values.value_lengths()}


def _places(names: Iterable[str]) -> dict[str, int]:
    """The place of each different role, in their order; raises Odd where one is none."""
    different = dict.fromkeys(names)
    if not {*map(str.lower, different)} <= {*ROLES}:
        raise Odd
    return {name: PLACES[ROLES[name.lower()]] for name in different}


def _joined(fields: Fields, side: str) -> Turns:
    roles, lengths = (np.array(fields[f"{side}.{name}"], np.int64) for name in ("roles", "lengths"))
    return Turns.flat(roles, texts(fields[f"{side}.contents"]), lengths)
