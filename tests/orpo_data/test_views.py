"""Other trainers' columns: hand-worked rows, what our own `pairs` source reads back, and the collators of TRL."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import orpo_data
from orpo_data.errors import OrpoError, UsageError
from orpo_data.schema import PAIRS, TOKENIZED
from orpo_data.sources import pairs as pairs_source
from orpo_data.views import TEXT_VIEWS, TOKEN_VIEWS, View

READ_BACK: dict[str, dict[str, str]] = {
    "axolotl": {},
    "llama-factory": {},
    "openai": {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},
    "trl": {},
}
"""What a recipe says under `columns` to read a form with the source `pairs`."""


def rows_of(view: View, rows: list[Any], schema: pa.Schema) -> list[dict[str, Any]]:
    frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=schema))
    assert isinstance(frame, pl.DataFrame)
    return view(frame.lazy()).collect().to_dicts()


# --- text ------------------------------------------------------------------------------------------------------------

USER, AGAIN = {"role": "user", "content": "Q?"}, {"role": "user", "content": "And?"}
SYSTEM, REPLY = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "A."}
GOOD, BAD = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
FORMS = {
    "axolotl": {
        "messages": [SYSTEM, USER, REPLY, AGAIN],
        "system": "Be kind.",
        "chosen": [USER, REPLY, AGAIN, GOOD],
        "rejected": [USER, REPLY, AGAIN, BAD],
    },
    "llama-factory": {
        "conversations": [
            {"from": "human", "value": "Q?"},
            {"from": "gpt", "value": "A."},
            {"from": "human", "value": "And?"},
        ],
        "system": "Be kind.",
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "openai": {
        "input": {"messages": [SYSTEM, USER, REPLY, AGAIN]},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "trl": {"prompt": [SYSTEM, USER, REPLY, AGAIN], "chosen": [GOOD], "rejected": [BAD]},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_worked_by_hand(make_pair: Callable[..., Any], form: str) -> None:
    assert rows_of(TEXT_VIEWS[form], [make_pair([SYSTEM, USER, REPLY, AGAIN], "Yes.", "No.")], PAIRS) == [FORMS[form]]


@pytest.mark.parametrize("form", ["axolotl", "llama-factory"])
def test_no_system_message_is_an_empty_one(make_pair: Callable[..., Any], form: str) -> None:
    assert rows_of(TEXT_VIEWS[form], [make_pair()], PAIRS)[0]["system"] == ""


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(lambda text: f"{text}.")


@given(
    st.lists(
        st.tuples(st.lists(contents, min_size=1, max_size=5).filter(lambda t: len(t) % 2), contents, contents),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_the_source_pairs_reads_back_what_was_written(
    make_pair: Callable[..., Any],
    turns: Callable[..., Any],
    drawn: list[tuple[list[str], str, str]],
    system: bool,
) -> None:
    head = [SYSTEM] if system else []
    rows = [make_pair([*head, *turns(*prompt)], chosen, rejected) for prompt, chosen, rejected in drawn]
    for form, view in TEXT_VIEWS.items():
        for row, written in zip(rows, rows_of(view, rows, PAIRS), strict=True):
            read = pairs_source.parse(json.loads(json.dumps(written)), READ_BACK[form])
            assert {name: read[name] for name in ("prompt", "chosen", "rejected")} == {
                name: row[name] for name in ("prompt", "chosen", "rejected")
            }


# --- token ids --------------------------------------------------------------------------------------------------------

TOKENS = {"chosen_input_ids": [5, 6, 7, 8], "rejected_input_ids": [5, 6, 9], "prompt_len": 2}
TOKEN_FORMS = {
    "axolotl": {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 1], "labels": [-100, -100, 7, 8]},
    "llama-factory": {
        "chosen_input_ids": [5, 6, 7, 8],
        "chosen_attention_mask": [1, 1, 1, 1],
        "chosen_labels": [-100, -100, 7, 8],
        "rejected_input_ids": [5, 6, 9],
        "rejected_attention_mask": [1, 1, 1],
        "rejected_labels": [-100, -100, 9],
        **dict.fromkeys(("images", "videos", "audios")),
    },
    "torchtune": {
        "chosen_input_ids": [5, 6, 7, 8],
        "chosen_labels": [-100, -100, 7, 8],
        "rejected_input_ids": [5, 6, 9],
        "rejected_labels": [-100, -100, 9],
    },
    "trl": {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]},
    "trl-reward": {"chosen_ids": [5, 6, 7, 8], "rejected_ids": [5, 6, 9]},
}


@pytest.mark.parametrize("form", TOKEN_VIEWS)
def test_token_ids_worked_by_hand(form: str) -> None:
    row = dict.fromkeys(TOKENIZED.names) | TOKENS
    assert rows_of(TOKEN_VIEWS[form], [row], TOKENIZED) == [TOKEN_FORMS[form]]


def test_labels_are_those_of_the_collator(prepared: Path) -> None:
    rows = orpo_data.load(prepared / "tokenize", split="eval").to_list()
    batch = orpo_data.PairCollator(pad_token_id=0)(rows)
    view = orpo_data.view(prepared / "tokenize", "torchtune", split="eval")
    assert len(view) == len(rows)
    for i, row in enumerate(view):
        for side in ("chosen", "rejected"):
            assert row[f"{side}_labels"] == batch[f"{side}_labels"][i][: len(row[f"{side}_labels"])].tolist()


def test_trl_collates_the_view_to_our_sequences(prepared: Path) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = orpo_data.load(prepared / "tokenize").to_list()[:3]
    view = orpo_data.view(prepared / "tokenize", "trl").to_list()[:3]
    batch = DataCollatorForPreference(pad_token_id=0)(view)
    sequences = [row[f"{side}_input_ids"] for side in ("chosen", "rejected") for row in rows]
    for ids, mask, sequence, row in zip(
        batch["input_ids"], batch["completion_mask"], sequences, [*rows, *rows], strict=True
    ):
        assert ids[: len(sequence)].tolist() == sequence
        assert mask.tolist().index(1) == row["prompt_len"]


# --- as datasets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["clean", "split", "tokenize"])
def test_every_view_opens_as_a_dataset_of_plain_types(prepared: Path, stage: str) -> None:
    rows = orpo_data.load(prepared / stage)
    for trainer in TOKEN_VIEWS if stage == "tokenize" else TEXT_VIEWS:
        view = orpo_data.view(prepared / stage, trainer)
        assert len(view) == len(rows)
        assert "large" not in str(view.data.schema)
        assert "view" not in str(view.data.schema)


def test_a_trainer_without_a_view(prepared: Path) -> None:
    with pytest.raises(UsageError, match=r"clean: there is no view 'torchtune' .*, there are axolotl, llama-factory,"):
        orpo_data.view(prepared / "clean", "torchtune")


def test_pairs_that_are_not_cleaned(prepared: Path) -> None:
    with pytest.raises(OrpoError, match=r"binarize: is the output of binarize; give the folder of clean or split"):
        orpo_data.view(prepared / "binarize", "trl")
