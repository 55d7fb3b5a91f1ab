"""PPO: its parts by hand, one number however a step is cut, a reward that rises, and what it refuses."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_data.errors import OrpoError
from orpo_train import loop, ppo
from orpo_train.attention import own_attention
from orpo_train.config import TrainConfig
from orpo_train.loop import train
from orpo_train.objectives.ppo import adapted, clipped_loss, gae, value_loss, whitened
from orpo_train.ppo import PpoRun, draw_answers, lesson_of, set_up_ppo, token_rewards

Make = Callable[..., Any]
PROMPTS = [[5, 6], [7], [8, 9, 10], [11, 12], [13], [14, 15, 16, 17], [18, 19], [20]]
LIKED = 50  # the token that the judge likes


@pytest.fixture
def judge(make_model: Make, chat_tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A reward model made by hand: its score is how far the last token's embedding points to that of LIKED."""
    folder = tmp_path / "judge"
    model = make_model("llama", scalar_head=True, scale=1.0)
    with torch.no_grad():
        model.score.weight.zero_()
        hidden = model.model(input_ids=torch.tensor([[LIKED]])).last_hidden_state[0, 0]
        model.score.weight.copy_(hidden / hidden.norm())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(chat_tokenizer_dir).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(judge: Path, model_folder: Make, chat_tokenizer_dir: Path, tmp_path: Path, make_config: Make) -> Make:
    """A configuration; the tokenizer lies where a run expects it."""
    AutoTokenizer.from_pretrained(chat_tokenizer_dir).save_pretrained(tmp_path / "run")

    def make(**changes: Any) -> TrainConfig:
        own = {"reward_model": str(judge), "max_new_tokens": 6, "kl": 0.05, "minibatches": 1} | changes.pop("ppo", {})
        usual = {"model": str(model_folder()), "objective": "ppo", "batch_size": 8, "learning_rate": 1e-2, "ppo": own}
        return make_config(**usual | changes)

    return make


@pytest.fixture
def table(make_table: Make) -> pa.Table:
    return make_table([(prompt, [3, 2], [4, 2]) for prompt in PROMPTS])


@pytest.fixture
def begin(settings: Make, table: pa.Table, tmp_path: Path) -> Callable[..., PpoRun]:
    return lambda **changes: set_up_ppo(settings(**changes), table, None, tmp_path / "run")


@pytest.fixture
def run(settings: Make, table: pa.Table, tmp_path: Path) -> Make:
    def start(held_out: pa.Table | None = None, **changes: Any) -> list[dict[str, Any]]:
        train(settings(**changes), table, held_out, tmp_path / "run", "f" * 64)
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return start


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_clipped_objective_by_hand() -> None:
    """clip 0.2. Ratios 1.5 and 0.5, advantages 2 and -2.

    ratio 1.5, A = 2: min(3, 1.2 * 2) = 2.4, no gradient; A = -2: min(-3, -2.4) = -3, the worse of both counts.
    ratio 0.5, A = 2: min(1, 0.8 * 2) = 1; A = -2: min(-1, -1.6) = -1.6, no gradient.
    """
    old = torch.log(torch.tensor([0.2, 0.2, 0.2, 0.2]))
    logps = torch.log(torch.tensor([0.3, 0.3, 0.1, 0.1])).requires_grad_()
    losses = clipped_loss(logps, old, torch.tensor([2.0, -2.0, 2.0, -2.0]), clip=0.2)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([-2.4, 3.0, -1.0, 1.6]))
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 3.0, -1.0, 0.0]))


def test_the_value_loss_by_hand() -> None:
    """clip 0.2, old value 1. A value of 2 with return 3: 0.5 from itself, 1.62 from 1.2: the worse one, no gradient.
    A value of 1.1 with return 3 is within the clip: 1.9^2 / 2."""
    values = torch.tensor([2.0, 1.1], requires_grad=True)
    losses = value_loss(values, torch.ones(2), torch.tensor([3.0, 3.0]), clip=0.2)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([1.62, 1.805]))
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -1.9]))


def test_advantages_by_hand() -> None:
    """gamma 1/2, lambda 1/2, rewards 1, 0, 4, values 2, 2, 2.

    deltas: 1 + 1 - 2 = 0, 0 + 1 - 2 = -1, 4 + 0 - 2 = 2. A_3 = 2, A_2 = -1 + 2/4 = -1/2, A_1 = 0 - 1/8.
    """
    advantages = gae(torch.tensor([1.0, 0.0, 4.0]), torch.tensor([2.0, 2.0, 2.0]), gamma=0.5, lambda_=0.5)
    assert advantages.tolist() == [-0.125, -0.5, 2.0]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0.1, 1))
def test_with_lambda_1_an_advantage_is_the_discounted_return_less_the_value(rewards: list[float], gamma: float) -> None:
    values = torch.linspace(-1, 1, len(rewards), dtype=torch.float64)
    advantages = gae(torch.tensor(rewards, dtype=torch.float64), values, gamma, lambda_=1.0)
    returns = [sum(gamma ** (t - s) * rewards[t] for t in range(s, len(rewards))) for s in range(len(rewards))]
    torch.testing.assert_close(advantages + values, torch.tensor(returns, dtype=torch.float64))


def test_whitened_values_have_no_mean_and_variance_1() -> None:
    values = whitened(torch.tensor([1.0, 2.0, 6.0]))
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.var(unbiased=False).item() == pytest.approx(1)
    assert whitened(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_the_adaptive_weight_by_hand() -> None:
    """A KL ten per cent over its target adds one per cent; however far off, no step moves it by more than two."""
    assert adapted(0.1, 6.6, 6.0) == pytest.approx(0.101)
    assert adapted(0.1, 600.0, 6.0) == pytest.approx(0.102)
    assert adapted(0.1, 0.0, 6.0) == pytest.approx(0.098)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_what_is_read_of_answers_is_what_the_model_says_of_them(begin: Make, judge: Path) -> None:
    run = begin()
    with torch.no_grad():
        run.bare_scorer.value_head.weight.normal_()
        for weight in run.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    answers = draw_answers(run, run.data, np.arange(8), seed=1)
    reference = AutoModelForCausalLM.from_pretrained(run.config.model)
    start = 0
    for number, length in enumerate(answers.lengths.tolist()):
        ids = torch.tensor([answers.data.ids(number, "chosen").tolist()])
        prompt = answers.data.prompt_len(number)
        assert ids[0, :prompt].tolist() == PROMPTS[number]
        assert 1 <= length <= 6
        ours = slice(start, start + length)
        with torch.no_grad(), own_attention(run.model):
            for model, row in ((run.model, answers.logps), (reference, answers.reference)):
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[prompt - 1 :, 0]
                torch.testing.assert_close(row[ours], logps, rtol=1e-4, atol=1e-5)
            hidden = run.model.model(ids).last_hidden_state[0, prompt - 1 : -1]
            torch.testing.assert_close(
                answers.values[ours], run.bare_scorer.value_head(hidden)[:, 0], atol=1e-5, rtol=1e-4
            )
        start += length
    assert answers.scores.tolist() == run.judge([answers.data.ids(i, "chosen").tolist() for i in range(8)]).tolist()


def test_rewards_are_the_kl_of_each_token_and_the_score_with_the_last(begin: Make) -> None:
    run = begin()
    with torch.no_grad():
        run.model.lm_head.weight.add_(0.1 * torch.randn_like(run.model.lm_head.weight))
    answers = draw_answers(run, run.data, np.arange(8), seed=1)
    rewards = token_rewards(answers, kl_weight=0.5)
    assert answers.kl.abs().max() > 1e-3
    for number, (kl, reward) in enumerate(
        zip(answers.kl.split(answers.lengths.tolist()), rewards.split(answers.lengths.tolist()), strict=True)
    ):
        assert reward[:-1].tolist() == pytest.approx((-0.5 * kl[:-1]).tolist())
        assert reward[-1].item() == pytest.approx((answers.scores[number] - 0.5 * kl[-1]).item())


def test_at_the_start_there_is_no_kl_with_adapters_or_without(begin: Make) -> None:
    for changes in ({}, {"lora": {"rank": 2}}):
        run = begin(**changes)
        assert (run.reference is None) is ("lora" in changes)
        answers = draw_answers(run, run.data, np.arange(8), seed=1)
        assert answers.kl.abs().max() < 1e-5


def test_with_adapters_the_reference_is_the_model_without_them(begin: Make) -> None:
    run = begin(lora={"rank": 2})
    before = draw_answers(run, run.data, np.arange(8), seed=1)
    with torch.no_grad():
        for name, weight in run.model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    moved = draw_answers(run, run.data, np.arange(8), seed=1)
    read = ppo.read_tokens(run, run.bare_scorer, before.data)[0]
    with ppo.adapters_off(run.model):
        off = ppo.read_tokens(run, run.bare_scorer, before.data)[0]
    assert (read - before.logps).abs().max() > 1e-2
    torch.testing.assert_close(off, before.reference)
    assert moved.kl.abs().max() > 1e-2


def test_answers_end_where_the_datasets_do(begin: Make) -> None:
    run = begin()
    assert 2 in run.ends
    answers = draw_answers(run, run.data, np.arange(8), seed=3)
    for number, length in enumerate(answers.lengths.tolist()):
        response = answers.data.response(number, "chosen").tolist()
        assert length == 6 or response[-1] in run.ends
        assert not set(response[:-1]) & run.ends


# --- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_tokens": 24}, {"layout": "plain"}])
def test_a_step_is_the_same_however_it_is_cut(begin: Make, changes: dict[str, Any]) -> None:
    steps = []
    for cut in ({}, changes):
        run = begin(**cut)
        metrics = ppo.ppo_step(run, 0)
        steps.append((metrics, {name: weight.clone() for name, weight in run.bare_scorer.named_parameters()}))
    (whole, weights), (cut_up, others) = steps
    assert cut_up == pytest.approx(whole, rel=1e-3, abs=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2-dropout"])
def test_the_first_update_is_the_plain_policy_gradient(begin: Make, model_folder: Make, kind: str) -> None:
    """The ratio is 1: the loss is minus the mean advantage, which whitening makes 0, and nothing is clipped."""
    run = begin(model=str(model_folder(kind)), ppo={"epochs": 1, "minibatches": 1})
    metrics = ppo.ppo_step(run, 0)
    assert metrics["policy_loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)


def test_every_answer_is_learnt_from_in_each_epoch(begin: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[list[int]] = []
    learn = ppo.learn

    def recorded(run: PpoRun, lesson: Any, part: Any) -> dict[str, float]:
        parts.append(part.tolist())
        return learn(run, lesson, part)

    monkeypatch.setattr(ppo, "learn", recorded)
    ppo.ppo_step(begin(ppo={"epochs": 2, "minibatches": 3}), 0)
    assert [len(part) for part in parts] == [3, 3, 2] * 2
    for epoch in (parts[:3], parts[3:]):
        assert sorted(chain(*epoch)) == list(range(8))
    assert parts[:3] != parts[3:]


def test_an_update_is_the_mean_over_the_tokens(begin: Make) -> None:
    """Against the model run on one answer after the other, and plain autograd."""
    run = begin(ppo={"value_weight": 0.25, "clip": 0.03})
    torch.manual_seed(0)
    with torch.no_grad():
        run.bare_scorer.value_head.weight.normal_()
        answers = draw_answers(run, run.data, np.arange(8), seed=1)
        for weight in run.model.parameters():
            weight.add_(0.3 * weight.std() * torch.randn_like(weight))  # so that ratios are not 1, and some are clipped
    lesson = lesson_of(answers, 0.05, run.ppo)
    losses, ratios, start = [], [], 0
    for number, length in enumerate(answers.lengths.tolist()):
        ids = torch.tensor([answers.data.ids(number, "chosen").tolist()])
        first, at = answers.data.prompt_len(number) - 1, slice(start, start + length)
        with own_attention(run.model):
            logps = run.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[first:, 0]
            values = run.bare_scorer.value_head(run.model.model(ids).last_hidden_state[0, first:-1])[:, 0]
        policy = clipped_loss(logps, answers.logps[at], lesson.advantages[at], 0.03)
        losses.append(policy + 0.25 * value_loss(values, answers.values[at], lesson.returns[at], 0.03))
        ratios.append((logps - answers.logps[at]).exp())
        start += length
    loss = torch.cat(losses).mean()
    gradients = torch.autograd.grad(loss, [*run.bare_scorer.parameters()])
    told = ppo.learn(run, lesson, np.arange(8))
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert told["grad_norm"] == pytest.approx(torch.cat([part.flatten() for part in gradients]).norm().item(), rel=1e-3)
    ratio = torch.cat(ratios)
    assert told["clip_fraction"] == pytest.approx(((ratio < 0.97) | (ratio > 1.03)).float().mean().item())
    assert (ratio < 0.97).any()
    assert (ratio > 1.03).any()


def test_each_step_draws_anew(run: Make) -> None:
    """The same prompts and, but for rounding, the same model."""
    first, second = run(epochs=2, learning_rate=1e-12)
    assert first["score"] != pytest.approx(second["score"])


def test_advantages_stop_at_the_end_of_an_answer(begin: Make) -> None:
    """What one answer is worth is nothing to the next one in the row."""
    run = begin()
    answers = draw_answers(run, run.data, np.arange(8), seed=1)
    lesson = lesson_of(answers, 0.1, run.ppo)
    rewards = token_rewards(answers, 0.1)
    alone = gae(rewards[: answers.lengths[0]], answers.values[: answers.lengths[0]], 1.0, 0.95)
    torch.testing.assert_close(lesson.returns[: len(alone)], alone + answers.values[: len(alone)])


def test_the_reward_rises(run: Make) -> None:
    lines = run(epochs=12, learning_rate=3e-3, ppo={"kl": 0.01})
    first, last = (np.mean([line["score"] for line in part]) for part in (lines[:2], lines[-2:]))
    assert last > first + 0.5
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["kl"] > 0


def test_a_heavy_kl_keeps_the_model_where_it_began(run: Make) -> None:
    """The only thing to learn is then to stay: answers drawn anew have the log-probabilities of the reference."""
    free, held = (
        np.mean([line["kl"] for line in run(epochs=12, learning_rate=2e-2, ppo={"kl": weight})[-3:]])
        for weight in (0.0, 10.0)
    )
    assert abs(held) < free / 2


def test_the_adaptive_weight_follows_the_kl(run: Make) -> None:
    weights = [line["kl_weight"] for line in run(epochs=3, ppo={"kl_target": 5.0})]
    assert weights[0] == 0.05
    assert weights[1] == pytest.approx(0.05 * 0.98), "nothing had moved yet"


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_language_model_and_its_figures(run: Make, table: pa.Table, tmp_path: Path) -> None:
    lines = run(held_out=table, epochs=2, eval_every=1)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"], "the value head stays behind"
    trained = json.loads((tmp_path / "run" / "train.json").read_text())
    assert (trained["steps"], trained["pairs"], trained["forward_passes"]) == (2, 16, 16 * 8)
    assert trained["tokens"] == sum(line.get("tokens", 0) for line in lines)
    held_out = [line for line in lines if "eval/score" in line]
    assert [line["step"] for line in held_out] == [0, 1, 2]
    for line in held_out:
        assert line["eval/loss"] == pytest.approx(-line["eval/score"] + 0.05 * line["eval/kl"], abs=1e-5)
    assert (tmp_path / "run" / "curves.png").stat().st_size


class PowerCut(BaseException):
    """No code of ours catches this."""


def test_an_interrupted_run_ends_in_the_same_weights(
    run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"epochs": 4, "save_every": 2, "log_every": 4, "ppo": {"kl_target": 1.0}}
    whole = run(**changes)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    report = json.loads((tmp_path / "run" / "train.json").read_text())
    for path in ("checkpoints/step-000004", "checkpoints/step-000002"):
        assert (tmp_path / "run" / path).is_dir()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    save = loop.save_checkpoint

    def save_and_die(root: Path, step: int, *rest: Any, **named: Any) -> None:
        save(root, step, *rest, **named)
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_checkpoint", save_and_die)
        with pytest.raises(PowerCut):
            run(**changes)
    assert run(**changes) == whole
    assert json.loads((tmp_path / "run" / "train.json").read_text()) == report
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_adapters_learn_and_are_merged(run: Make, settings: Make, tmp_path: Path) -> None:
    lines = run(epochs=12, learning_rate=2e-2, lora={"rank": 4}, ppo={"kl": 0.01})
    assert lines[-1]["score"] > lines[0]["score"] + 0.3
    merged = load_file(tmp_path / "run" / "model.safetensors")
    base = load_file(Path(settings().model) / "model.safetensors")
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[name], base[name]) for name in base)


def test_prompts_that_stand_in_several_pairs_are_answered_once(
    settings: Make, make_table: Make, tmp_path: Path
) -> None:
    twice = make_table([(prompt, [3, 2], [4, 2]) for prompt in PROMPTS[:3] for _ in range(2)])
    assert len(set_up_ppo(settings(), twice, None, tmp_path / "run").data) == 3


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_a_judge_that_gives_no_number_is_one_line(run: Make, judge: Path) -> None:
    from orpo_train.reward import load_reward_model

    model = load_reward_model(judge)
    with torch.no_grad():
        model.score.weight[0, 0] = math.nan  # type: ignore[index, operator, union-attr]
    model.save_pretrained(judge)
    with pytest.raises(OrpoError, match="the reward model gives sequence 0 the score nan"):
        run(epochs=1)


def test_a_language_model_as_judge_is_one_line(run: Make, model_folder: Make) -> None:
    with pytest.raises(OrpoError, match="is no reward model"):
        run(ppo={"reward_model": str(model_folder())})


def test_a_prompt_that_leaves_no_room_is_refused_before_any_step(run: Make) -> None:
    with pytest.raises(OrpoError, match=r"a prompt has 4 tokens, with ppo\.max_new_tokens \(6\).*raise train\.micro"):
        run(micro_batch_tokens=9)


def test_a_held_out_prompt_that_leaves_no_room_is_refused_before_any_step(run: Make, make_table: Make) -> None:
    held_out = make_table([([5, 6, 7, 8, 9, 10], [3, 2], [4, 2])])
    with pytest.raises(OrpoError, match=r"a prompt has 6 tokens, with ppo\.max_new_tokens \(20\)"):
        run(held_out, micro_batch_tokens=25, ppo={"max_new_tokens": 20})


def test_settings_that_do_not_fit_are_told(settings: Make) -> None:
    with pytest.raises(ValidationError, match=r"objective ppo needs ppo\.reward_model"):
        TrainConfig(model="m", objective="ppo")
    with pytest.raises(ValidationError, match="gradient_checkpointing: objective ppo runs without dropout"):
        settings(gradient_checkpointing=True)


def test_the_papers_settings_are_the_defaults() -> None:
    config = TrainConfig.model_validate({"model": "m", "objective": "ppo", "ppo": {"reward_model": "r"}})
    assert config.ppo is not None
    assert (config.ppo.kl, config.batch_size, config.learning_rate) == (0.1, 64, 1e-5)
    assert config.ppo.kl_target is None
    assert TrainConfig(model="m").learning_rate == 8e-6
