"""Padded tensors of pairs: hand-worked batches, and what holds for any."""

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data import PairCollator
from orpo_data.collator import IGNORED

ROWS = [
    {"chosen_input_ids": [5, 6, 7, 8], "rejected_input_ids": [5, 6, 9], "prompt_len": 2},
    {"chosen_input_ids": [4, 3], "rejected_input_ids": [4, 2, 1], "prompt_len": 1},
]


def test_a_batch_worked_by_hand() -> None:
    batch = {name: tensor.tolist() for name, tensor in PairCollator(pad_token_id=0)(ROWS).items()}
    assert batch == {
        "chosen_input_ids": [[5, 6, 7, 8], [4, 3, 0, 0]],
        "chosen_attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "chosen_labels": [[-100, -100, 7, 8], [-100, 3, -100, -100]],
        "rejected_input_ids": [[5, 6, 9, 0], [4, 2, 1, 0]],
        "rejected_attention_mask": [[1, 1, 1, 0], [1, 1, 1, 0]],
        "rejected_labels": [[-100, -100, 9, -100], [-100, 2, 1, -100]],
    }


@pytest.mark.parametrize(("multiple", "length"), [(1, 4), (2, 4), (3, 6), (8, 8)])
def test_a_length_of_a_multiple(multiple: int, length: int) -> None:
    batch = PairCollator(pad_token_id=0, pad_to_multiple_of=multiple)(ROWS)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, length)}


@st.composite
def token_rows(draw: st.DrawFn) -> dict[str, Any]:
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=6)
    prompt = draw(ids)
    return {
        "chosen_input_ids": prompt + draw(ids),
        "rejected_input_ids": prompt + draw(ids),
        "prompt_len": len(prompt),
    }


@given(st.lists(token_rows(), min_size=1, max_size=5), st.integers(0, 9))
def test_ids_come_back_and_labels_are_the_responses_also_where_padding_looks_like_a_token(
    rows: list[dict[str, Any]], pad: int
) -> None:
    batch = PairCollator(pad_token_id=pad)(rows)
    assert len({tensor.shape for tensor in batch.values()}) == 1  # the sides can be stacked
    for side in ("chosen", "rejected"):
        ids, mask, labels = (batch[f"{side}_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        for i, row in enumerate(rows):
            assert ids[i][mask[i].bool()].tolist() == row[f"{side}_input_ids"]
            assert labels[i][labels[i] != IGNORED].tolist() == row[f"{side}_input_ids"][row["prompt_len"] :]
            assert (labels[i][: row["prompt_len"]] == IGNORED).all()
            assert (labels[i][mask[i] == 0] == IGNORED).all()


def test_torch_is_not_loaded_before_the_call() -> None:
    code = "import sys, orpo_data; orpo_data.PairCollator(pad_token_id=0); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
