"""Generation: the likeliest tokens as transformers finds them, draws by hand, and answers that no neighbour changes."""

import copy
import doctest
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_data.errors import OrpoError
from orpo_train import generate as module
from orpo_train.attention import use_packed_attention
from orpo_train.config import Sampling
from orpo_train.generate import choose, end_tokens, generate, nucleus

Make = Callable[..., Any]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6], [300, 20, 4, 4, 4]]
GREEDY = Sampling(max_new_tokens=9, temperature=0)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


# --- whole answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["llama", "gpt2", "opt", "opt-projected", "mistral-window", "gemma3-window", "gemma2-capped", "phi", "bloom"],
)
def test_greedy_answers_are_those_of_transformers(make_model: Make, kind: str) -> None:
    """Each prompt alone there, all of them padded here; windows of 4 are shorter than the prompts."""
    model, ends = make_model(kind, scale=3.0).eval(), {2, 17}
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=0,
        )
        expected.append(whole[0, len(prompt) :].tolist())
    assert generate(model, PROMPTS, GREEDY, ends) == expected
    assert len({tuple(answer) for answer in expected}) > 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_one_that_reaches_the_last_position_does_not_stop_the_others(make_model: Make, kind: str) -> None:
    """It stays among them until half have ended, and has no position any more."""
    model = make_model(kind, scale=3.0).eval()
    prompts = [[5, 6, 7, 8] * 63, *([9, 10 + n] for n in range(3))]
    answers = generate(model, prompts, Sampling(max_new_tokens=20, temperature=0), set())
    assert list(map(len, answers)) == [4, 20, 20, 20]
    assert [generate(model, [prompt], Sampling(max_new_tokens=20, temperature=0), set()) for prompt in prompts] == [
        [answer] for answer in answers
    ]


@settings(max_examples=15)
@given(
    order=st.permutations(range(len(PROMPTS))),
    batch_tokens=st.integers(1, 100),
    seed=st.integers(0, 2**40),
    top_p=st.sampled_from([0.7, 1.0]),
)
def test_an_answer_is_the_same_beside_any_others(
    make_model: Make, order: list[int], batch_tokens: int, seed: int, top_p: float
) -> None:
    """Alone, in any order, in batches of any size; rows that have ended leave a batch on the way."""
    model, ends = make_model("llama", scale=2.0), set(range(100))
    sampling = Sampling(max_new_tokens=12, top_p=top_p, seed=seed)
    alone = [generate(model, [prompt], sampling, ends)[0] for prompt in PROMPTS]
    together = generate(model, [PROMPTS[i] for i in order], sampling, ends, batch_tokens)
    assert together == [alone[i] for i in order]


def test_another_seed_is_another_answer(make_model: Make) -> None:
    model = make_model("llama", scale=1.0)
    answers = [generate(model, PROMPTS, Sampling(max_new_tokens=8, seed=seed), {2}) for seed in (1, 2, 1)]
    assert answers[0] == answers[2]
    assert all(a != b for a, b in zip(answers[0], answers[1], strict=True))


def test_each_prompt_has_a_stream_of_its_own(make_model: Make) -> None:
    """Where every token is equally likely whatever the prompt, the draws alone tell answers apart."""
    answers = generate(make_model("llama", scale=0.0), [[5], [6], [5, 0], [5]], Sampling(max_new_tokens=8), set())
    assert answers[0] == answers[3]
    assert len(set(map(tuple, answers))) == 3


def test_an_answer_ends_at_its_end_token_or_where_there_is_no_room(make_model: Make) -> None:
    """The model takes 256 positions, a prompt of 250 leaves 6."""
    model = make_model("gpt2", scale=1.0)
    free = generate(model, [[5, 6, 7], [1] * 250], Sampling(max_new_tokens=20), set())
    assert [len(answer) for answer in free] == [20, 6]
    stopped = generate(model, [[5, 6, 7]], Sampling(max_new_tokens=20), {free[0][4]})[0]
    assert stopped == free[0][: free[0].index(free[0][4]) + 1]


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_model_in_a_packed_layout_answers_too_and_stays_in_it(make_model: Make, backend: str) -> None:
    model = make_model("llama", scale=3.0).train()
    expected = generate(model, PROMPTS, GREEDY, {2})
    use_packed_attention(model, backend)
    usual = model.config._attn_implementation
    assert generate(model, PROMPTS, GREEDY, {2}) == expected
    assert model.config._attn_implementation == usual
    assert model.training


def test_dropout_is_off(make_model: Make) -> None:
    model = make_model("gpt2-dropout", scale=2.0).train()
    assert generate(model, PROMPTS, GREEDY, {2}) == generate(model, PROMPTS, GREEDY, {2})


def test_bf16(make_model: Make) -> None:
    """Weights in bf16 and autocast give whole answers; autocast over fp32 weights leaves them in fp32."""
    model = make_model("llama", scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = generate(model, PROMPTS, Sampling(max_new_tokens=5), set())
    small = generate(copy.deepcopy(model).bfloat16(), PROMPTS, Sampling(max_new_tokens=5), set())
    assert {len(answer) for answer in [*cast, *small]} == {5}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_no_prompts_no_answers(make_model: Make) -> None:
    assert generate(make_model(), [], GREEDY, set()) == []


def test_end_tokens(make_model: Make) -> None:
    class Tokenizer:
        eos_token_id: int | None = 7

    model, tokenizer = make_model(), Tokenizer()
    assert end_tokens(model, tokenizer) == {2, 7}
    model.generation_config.eos_token_id = [2, 3]
    assert end_tokens(model, tokenizer) == {2, 3, 7}
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    assert end_tokens(model, tokenizer) == set()


# --- one token -------------------------------------------------------------------------------------------------------


def drawn(probabilities: list[float], **sampling: float) -> list[float]:
    """Share of each token among 20,000 draws from one stream."""
    n = 20_000
    logits = torch.tensor(probabilities).log().expand(n, -1)
    tokens = choose(logits, [torch.Generator().manual_seed(1)] * n, Sampling(**sampling))  # type: ignore[arg-type]
    return (np.bincount(tokens.numpy(), minlength=len(probabilities)) / n).tolist()


def test_draws_by_hand() -> None:
    """A share has a standard deviation of .0035. Temperature 0.5 squares: .25 .09 .04 of .38 are .658 .237 .105."""
    assert drawn([0.5, 0.3, 0.2]) == pytest.approx([0.5, 0.3, 0.2], abs=0.014)
    assert drawn([0.5, 0.3, 0.2], temperature=0.5) == pytest.approx([0.658, 0.237, 0.105], abs=0.014)
    assert drawn([0.3, 0.5, 0.2], temperature=0) == [0, 1, 0]


def test_draws_from_a_nucleus_by_hand() -> None:
    """Of .2 .5 .3, top_p 0.6 needs .5 and .3, which become .625 and .375."""
    assert drawn([0.2, 0.5, 0.3], top_p=0.6) == pytest.approx([0, 0.625, 0.375], abs=0.014)
    assert drawn([0.2, 0.5, 0.3], top_p=0.01) == [0, 1, 0]


@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=8), top_p=st.floats(0.05, 0.999))
def test_a_nucleus_is_enough_and_no_more_than_needed(weights: list[float], top_p: float) -> None:
    """What is kept has top_p; without its least likely tokens it would not."""
    probabilities = torch.tensor([weights], dtype=torch.float64)
    probabilities /= probabilities.sum()
    kept = nucleus(probabilities, top_p)[0]
    held = kept[kept > 0]
    assert kept.sum() >= top_p - 1e-9
    assert held[held > held.min()].sum() < top_p + 1e-9
    assert (probabilities[0][kept == 0] < held.min()).all()


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "told"),
    [([], "prompt 1 has 0 tokens: a model answers to one at least"), ([1] * 256, "prompt 1 has 256 tokens: .* 256")],
)
def test_a_prompt_without_room_is_named(make_model: Make, prompt: list[int], told: str) -> None:
    with pytest.raises(OrpoError, match=told):
        generate(make_model(), [[1], prompt], GREEDY, set())


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_refused(make_model: Make, temperature: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(OrpoError, match="logits are not finite"):
        generate(model, [[1]], Sampling(temperature=temperature), set())
