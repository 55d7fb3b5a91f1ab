"""Every table this project writes: the columns, what they mean, and in which unit.

A row walks RAW -> (RATED ->) PAIRS -> JUDGED -> RENDERED -> ENCODED -> TOKENIZED (-> REFERENCED); only RATED, PAIRS,
JUDGED, TOKENIZED, REFERENCED and DROPPED are ever written to disk. Types are the plain Arrow ones that every release of
`datasets` since 3.6 opens: string, int32, float32, list and struct, never large_* or *_view.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa

if TYPE_CHECKING:
    import polars as pl

MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
"""One turn. `role` is system, user or assistant; `content` is plain text."""

MESSAGES = pa.list_(MESSAGE)
TOKEN_IDS = pa.list_(pa.int32())

ORIGIN = [
    pa.field("source", pa.string()),  # the recipe's name for the source, e.g. "hh-rlhf"
    pa.field("source_file", pa.string()),  # file name relative to the source's path
    pa.field("source_row", pa.int32()),  # 0-based record in that file (for JSON lines: line number - 1)
]
"""Where a row comes from. Stays with the row through every stage that holds text."""

ORIGIN_COLUMNS = ["source", "source_file", "source_row"]
ROW_KEY = ["id", *ORIGIN_COLUMNS]
"""What tells any two rows of a dataset apart: one content may come from several places."""

SIDES = ("prompt", "chosen", "rejected")
ANSWERS = ("chosen", "rejected")
"""The columns of a pair that hold messages."""

RAW = pa.schema([*ORIGIN, pa.field("record", pa.string())])
"""One record of a raw file as JSON text, before anything looked inside."""

COMPLETION = pa.struct(
    [
        pa.field("model", pa.string()),
        pa.field("response", pa.string()),
        pa.field("system_prompt", pa.string()),  # the hidden prompt this answer was generated under
        pa.field("overall_score", pa.float32()),  # 1..10, null where missing
        pa.field("instruction_following", pa.float32()),  # 1..5, null for "N/A" or missing
        pa.field("honesty", pa.float32()),
        pa.field("truthfulness", pa.float32()),
        pa.field("helpfulness", pa.float32()),
    ]
)
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")

RATED = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("prompt", MESSAGES),
        pa.field("completions", pa.list_(COMPLETION)),
        pa.field("subset", pa.string()),  # the upstream's own name for a part of itself, e.g. "evol_instruct"
        *ORIGIN,
    ]
)
"""One prompt with several rated answers."""

PAIRS = pa.schema(
    [
        pa.field("id", pa.string()),  # content hash of prompt, chosen and rejected
        pa.field("prompt", MESSAGES),  # the turns both sides share
        pa.field("chosen", MESSAGES),  # the turns after them; after cleaning exactly one assistant message
        pa.field("rejected", MESSAGES),
        pa.field("score_chosen", pa.float32()),  # in the source's own unit; null where it has none
        pa.field("score_rejected", pa.float32()),
        pa.field("model_chosen", pa.string()),
        pa.field("model_rejected", pa.string()),
        pa.field("system_chosen", pa.string()),  # hidden system prompt an answer was generated under
        pa.field("system_rejected", pa.string()),
        pa.field("subset", pa.string()),
        *ORIGIN,
    ]
)
"""One prompt, a better and a worse answer: the explicit conversational form that TRL's trainers take unchanged."""

FLAG = pa.struct(
    [
        pa.field("rule", pa.string()),  # the name of the rule that noticed something, e.g. "refusal"
        pa.field("side", pa.string()),  # prompt, chosen, rejected or both
        pa.field("value", pa.float32()),  # what the rule measured, null where it only says yes or no
    ]
)

JUDGED = pa.schema(
    [
        *PAIRS,
        pa.field("flags", pa.list_(FLAG)),  # what rules set to `flag` found; empty where nothing was found
        pa.field("label_noise", pa.float32()),  # 0..1, how likely the preference is mislabelled; null if not scored
    ]
)
"""PAIRS after cleaning: what is left, and what one should know of it."""

RENDERED = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("prompt", MESSAGES),
        pa.field("prompt_text", pa.string()),  # up to and including the assistant's header
        pa.field("chosen_text", pa.string()),  # the answer as the template writes it, without its end of turn
        pa.field("rejected_text", pa.string()),
        *ORIGIN[1:],
    ]
)
"""A pair as text under a chat template (in memory only)."""

ENCODED = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("prompt", MESSAGES),
        pa.field("prompt_ids", TOKEN_IDS),
        pa.field("chosen_response_ids", TOKEN_IDS),  # the answer's ids and its end of turn, without the prompt
        pa.field("rejected_response_ids", TOKEN_IDS),
        *ORIGIN[1:],
    ]
)
"""A pair as token ids before any limit on length (in memory only)."""

ENCODED_SIDES = ("prompt_ids", "chosen_response_ids", "rejected_response_ids")
"""Its columns of token ids, in the order of SIDES."""

TOKENIZED = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("chosen_input_ids", TOKEN_IDS),  # whole sequence: prompt and answer
        pa.field("rejected_input_ids", TOKEN_IDS),
        pa.field("prompt_len", pa.int32()),  # both sides share their first prompt_len ids
        pa.field("source", pa.string()),
        pa.field("prompt_turns_dropped", pa.int32()),  # oldest turns left out to fit max_prompt_length
        pa.field("chosen_truncated", pa.bool_()),  # cut at max_length, so without its end of turn
        pa.field("rejected_truncated", pa.bool_()),
    ]
)
"""What training reads. Masks and labels follow from prompt_len and are not stored."""

REFERENCED = pa.schema(
    [
        *TOKENIZED,
        # log p(answer | prompt) under the reference model, summed over the answer's tokens
        pa.field("ref_chosen_logps", pa.float32()),
        pa.field("ref_rejected_logps", pa.float32()),
        pa.field("kl_input_ids", TOKEN_IDS),  # the prompt, then another prompt's chosen answer; null unless for kto
        pa.field("ref_kl_logps", pa.float32()),
    ]
)
"""TOKENIZED, and what a reference model makes of it."""

TOKEN_STAGES = ("tokenize", "reference")
"""Stages whose rows training reads."""

DROPPED = pa.schema(
    [
        pa.field("id", pa.string()),  # null when the record could not be parsed
        pa.field("step", pa.string()),
        pa.field("reason", pa.string()),  # a reason code, e.g. "identical_pair"
        pa.field("detail", pa.string()),  # which side failed, or what was wrong
        *ORIGIN,
        pa.field("row", pa.string()),  # the row as it entered the step, as JSON
    ]
)
"""A row that a step turned away, kept aside with the reason."""


@cache
def no_rows(schema: pa.Schema) -> pa.Table:
    """An empty table: one for all, since to make its columns takes longer than much of what is done with them."""
    return schema.empty_table()


def row_id(content: Mapping[str, Any] | Sequence[Any]) -> str:
    """128-bit content hash in hex: the same content has the same id on every machine."""
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def pair_id(prompt: Sequence[Mapping[str, str]], chosen: Sequence[Any], rejected: Sequence[Any]) -> str:
    """The `id` of a PAIRS row."""
    return row_id({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def row_ids(rows: "pl.DataFrame") -> pa.Array:
    """`row_id` of each row, a frame of texts, float64 numbers, and lists and structs of these.

    polars writes JSON as orjson does, byte for byte, once keys are sorted.
    """
    import polars as pl  # only where rows are made: reading a schema costs nothing

    from orpo_data.hashing import hex_hashes

    found = hex_hashes(rows.select(_canonical_json(pl.Struct(rows.schema))).to_series())
    return found.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())


@cache
def _canonical_json(kind: "pl.Struct") -> "pl.Expr":
    """A frame's rows as `row_id` writes them."""
    import polars as pl

    row = pl.struct([*kind.to_schema()])
    return _sorted_keys(row, kind).struct.json_encode()


def _sorted_keys(value: "pl.Expr", kind: Any) -> "pl.Expr":
    """`value` with the fields of every struct in it by name."""
    import polars as pl

    if isinstance(kind, pl.List):
        return value.list.eval(_sorted_keys(pl.element(), kind.inner))
    if isinstance(kind, pl.Struct):
        fields = sorted(kind.to_schema().items())
        content = pl.struct(_sorted_keys(value.struct.field(name), inner).alias(name) for name, inner in fields)
        return pl.when(value.is_not_null()).then(content)
    return value


def pair_ids(rows: "pl.DataFrame") -> pa.Array:
    """`pair_id` of each PAIRS row."""
    return row_ids(rows.select("prompt", "chosen", "rejected"))
