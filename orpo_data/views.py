"""Our rows under the columns that other trainers ask for: one function a form, from our frame to theirs.

>>> import orpo_data
>>> orpo_data.view("runs/hh/split", "llama-factory")         # text, as a datasets.Dataset
>>> orpo_data.view("runs/hh/tokenize", "torchtune")          # token ids
>>> views.torchtune_tokens(orpo_data.scan("runs/hh/tokenize", "train"))    # the same as a polars LazyFrame

TRL's trainers take the text as `orpo_data.load` gives it, and transformers' Trainer the token ids with
`orpo_data.PairCollator`: neither needs a view. Every view of token ids derives labels and masks from `prompt_len`:
-100 stands on the prompt, and only there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa

from orpo_data.collator import IGNORED
from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import read_manifest
from orpo_data.places import as_path
from orpo_data.schema import TOKEN_STAGES
from orpo_data.shards import scan

if TYPE_CHECKING:
    import datasets

View = Callable[[pl.LazyFrame], pl.LazyFrame]

CLEANED = ("clean", "split")  # the stages whose pairs have one answer of the assistant on each side

PROMPT, CHOSEN, REJECTED = pl.col("prompt"), pl.col("chosen"), pl.col("rejected")
HAS_SYSTEM = PROMPT.list.first().struct.field("role") == "system"
SYSTEM = pl.when(HAS_SYSTEM).then(PROMPT.list.first().struct.field("content")).otherwise(pl.lit(""))
TURNS = pl.when(HAS_SYSTEM).then(PROMPT.list.slice(1)).otherwise(PROMPT)
"""The prompt without its system message."""


# --- text: JUDGED in, one message of the assistant on each side ------------------------------------------------------


def trl(pairs: pl.LazyFrame) -> pl.LazyFrame:
    """TRL's "preference, conversational, explicit prompt": prompt, chosen and rejected, each a list of messages.

    https://huggingface.co/docs/trl/dataset_formats#preference
    """
    return pairs.select(PROMPT, CHOSEN, REJECTED)


def axolotl(pairs: pl.LazyFrame) -> pl.LazyFrame:
    """One form for axolotl's `rl: orpo` with `type: chat_template.argilla` and `rl: dpo` with `chat_template.default`.

    ORPO reads `system` and the whole conversations in `chosen` and `rejected`; DPO reads `messages` (the prompt) and
    the last message of either side. https://docs.axolotl.ai/docs/rlhf.html
    """
    whole = [TURNS.list.concat(side).alias(name) for name, side in (("chosen", CHOSEN), ("rejected", REJECTED))]
    return pairs.select(PROMPT.alias("messages"), SYSTEM.alias("system"), *whole)


def llama_factory(pairs: pl.LazyFrame) -> pl.LazyFrame:
    """LLaMA-Factory's "sharegpt" preference form: `conversations`, and one message each in `chosen` and `rejected`.

    https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md#preference-dataset-1
    """
    return pairs.select(
        TURNS.list.eval(_from_value(pl.element())).alias("conversations"),
        SYSTEM.alias("system"),
        _from_value(CHOSEN.list.first()).alias("chosen"),
        _from_value(REJECTED.list.first()).alias("rejected"),
    )


def _from_value(message: pl.Expr) -> pl.Expr:
    speaker = message.struct.field("role").replace_strict({"user": "human", "assistant": "gpt", "system": "system"})
    return pl.struct(speaker.alias("from"), message.struct.field("content").alias("value"))


def openai(pairs: pl.LazyFrame) -> pl.LazyFrame:
    """OpenAI's preference fine-tuning: `input`, `preferred_output`, `non_preferred_output`.

    https://developers.openai.com/api/docs/guides/direct-preference-optimization
    """
    return pairs.select(
        pl.struct(PROMPT.alias("messages")).alias("input"),
        CHOSEN.alias("preferred_output"),
        REJECTED.alias("non_preferred_output"),
    )


TEXT_VIEWS: dict[str, View] = {"axolotl": axolotl, "llama-factory": llama_factory, "openai": openai, "trl": trl}


# --- token ids: TOKENIZED in -----------------------------------------------------------------------------------------


def trl_tokens(tokens: pl.LazyFrame) -> pl.LazyFrame:
    """What `trl.trainer.dpo_trainer.DataCollatorForPreference` takes: the prompt's ids, and each answer's alone."""
    return tokens.select(
        pl.col("chosen_input_ids").list.head("prompt_len").alias("prompt_ids"),
        _response("chosen").alias("chosen_ids"),
        _response("rejected").alias("rejected_ids"),
    )


def trl_reward_tokens(tokens: pl.LazyFrame) -> pl.LazyFrame:
    """What TRL's RewardTrainer takes as a tokenized dataset: `chosen_ids` and `rejected_ids`, whole sequences."""
    return tokens.select(chosen_ids="chosen_input_ids", rejected_ids="rejected_input_ids")


def llama_factory_tokens(tokens: pl.LazyFrame) -> pl.LazyFrame:
    """What LLaMA-Factory's pairwise collator takes; put it where `tokenized_path` points, as the split "train".

    https://github.com/hiyouga/LLaMA-Factory/blob/main/src/llamafactory/data/processor/pairwise.py
    """
    sides = [
        column
        for side in ("chosen", "rejected")
        for column in (f"{side}_input_ids", _mask(side, f"{side}_attention_mask"), _labels(side, f"{side}_labels"))
    ]
    media = {name: pl.lit(None, pl.List(pl.String)) for name in ("images", "videos", "audios")}
    return tokens.select(*sides, **media)


def axolotl_tokens(tokens: pl.LazyFrame) -> pl.LazyFrame:
    """Axolotl's pre-tokenized form, which has one side: the chosen answers, for supervised training.

    https://docs.axolotl.ai/docs/dataset-formats/tokenized.html
    """
    return tokens.select(
        pl.col("chosen_input_ids").alias("input_ids"), _mask("chosen", "attention_mask"), _labels("chosen", "labels")
    )


def torchtune_tokens(tokens: pl.LazyFrame) -> pl.LazyFrame:
    """What torchtune's `padded_collate_dpo` takes.

    https://docs.pytorch.org/torchtune/stable/generated/torchtune.data.padded_collate_dpo.html
    """
    sides = [c for side in ("chosen", "rejected") for c in (f"{side}_input_ids", _labels(side, f"{side}_labels"))]
    return tokens.select(sides)


def _response(side: str) -> pl.Expr:
    return pl.col(f"{side}_input_ids").list.slice(pl.col("prompt_len"))


def _labels(side: str, name: str) -> pl.Expr:
    """The ids with the prompt's ignored."""
    return pl.lit(IGNORED, pl.Int32).repeat_by("prompt_len").list.concat(_response(side)).alias(name)


def _mask(side: str, name: str) -> pl.Expr:
    """Ones: nothing is padded yet."""
    return pl.lit(1, pl.Int8).repeat_by(pl.col(f"{side}_input_ids").list.len()).alias(name)


TOKEN_VIEWS: dict[str, View] = {
    "axolotl": axolotl_tokens,
    "llama-factory": llama_factory_tokens,
    "torchtune": torchtune_tokens,
    "trl": trl_tokens,
    "trl-reward": trl_reward_tokens,
}


# --- as a datasets.Dataset -------------------------------------------------------------------------------------------


def view(path: str | Path, trainer: str, split: str = "train") -> "datasets.Dataset":
    """A split of a cleaned or tokenized dataset under another trainer's columns, in memory.

    Raises UsageError for a trainer without a view of this kind of rows.
    """
    from datasets import Dataset

    folder = as_path(path)
    views = views_of(folder)
    if trainer not in views:
        raise UsageError(f"{folder}: there is no view {trainer!r} of this dataset, there are {', '.join(views)}")
    table = views[trainer](scan(folder, split)).collect().to_arrow()
    return Dataset(table.cast(pa.schema([column.with_type(_plain(column.type)) for column in table.schema])))


def views_of(folder: Path) -> dict[str, View]:
    """The views of a dataset folder; OrpoError where its rows are not cleaned pairs or token ids."""
    stage = read_manifest(folder).stage
    if stage in TOKEN_STAGES:
        return TOKEN_VIEWS
    if stage in CLEANED:
        return TEXT_VIEWS
    raise OrpoError(f"{folder}: is the output of {stage}; give the folder of clean or split, or of tokenize")


def _plain(kind: pa.DataType) -> pa.DataType:
    """An Arrow type without polars' large_* forms, which older readers of `datasets` do not know."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind
