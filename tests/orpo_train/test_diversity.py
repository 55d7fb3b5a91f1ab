"""Diversity by hand: distinct n-grams and similarities, within prompts and across them."""

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.errors import OrpoError
from orpo_train import diversity
from orpo_train.diversity import distinct, embed, lexical, semantic

Make = Callable[..., Any]


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(diversity).failed == 0


def test_within_and_across_by_hand() -> None:
    """Prompt 1 has "a b" twice (2 of 4 words are distinct), prompt 2 "c" and "d" (2 of 2): .75.

    The first draw has a, b, c (all distinct), the second a, b, d: 1.
    """
    assert lexical([["a b", "c"], ["A b", "d"]], 1) == {"within": 0.75, "across": 1.0}
    assert lexical([["a b", "c"], ["A b", "d"]], 2) == {"within": 0.5, "across": 1.0}
    assert lexical([["a a a", "a"]], 1) == {"within": None, "across": 0.25}  # a single draw has no within
    assert lexical([[""], [""]], 1) == {"within": None, "across": None}


@given(texts=st.lists(st.text("ab ", max_size=12), max_size=5), n=st.integers(1, 3))
def test_a_text_said_twice_halves_what_is_distinct(texts: list[str], n: int) -> None:
    once = distinct(texts, n)
    assert once is None or distinct(texts * 2, n) == pytest.approx(once / 2)
    assert once is None or 0 < once <= 1


@pytest.fixture
def embedder(make_model: Make, chat_tokenizer_dir: Path, tmp_path: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    make_model("llama", scale=5.0).save_pretrained(tmp_path / "embedder")
    PreTrainedTokenizerFast.from_pretrained(chat_tokenizer_dir).save_pretrained(tmp_path / "embedder")
    return tmp_path / "embedder"


def test_embeddings_are_mean_hidden_states_whatever_else_is_embedded(embedder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["Why does a fern grow?", "moss", "", "It likes light. " * 9]
    vectors = embed(texts, embedder)
    ids = AutoTokenizer.from_pretrained(embedder)(texts[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = AutoModel.from_pretrained(embedder)(input_ids=ids).last_hidden_state[0].mean(0)
    assert vectors[0] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert embed(texts[:1], embedder)[0] == pytest.approx(vectors[0], abs=1e-5)


def test_similarity_by_hand(embedder: Path) -> None:
    """Against the mean of all pairs' products; the same answer twice is as similar as can be."""
    draws = [["Why does a fern grow?", "moss", "a maple"], ["It likes light.", "moss", "an oak"]]
    first, second = (embed(draw, embedder) for draw in draws)
    told = semantic(draws, embedder)
    within = (first * second).sum(1)
    assert within[1] == pytest.approx(1, abs=1e-5)
    assert told["within"] == pytest.approx(within.mean(), abs=1e-5)
    across = [np.mean([v[i] @ v[j] for i in range(3) for j in range(3) if i < j]) for v in (first, second)]
    assert told["across"] == pytest.approx(np.mean(across), abs=1e-5)
    assert semantic(draws[:1], embedder)["within"] is None


def test_a_folder_without_a_model_is_one_line(chat_tokenizer_dir: Path) -> None:
    with pytest.raises(OrpoError, match="no model for embeddings") as caught:
        embed(["a"], chat_tokenizer_dir)
    assert "\n" not in str(caught.value)
