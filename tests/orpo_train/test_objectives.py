"""The losses by hand, at their extremes, and against plain autograd in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from orpo_train.config import TrainConfig
from orpo_train.objectives import (
    LARGEST_LOGP,
    OBJECTIVES,
    PairLogps,
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    log1mexp,
    log_odds,
    odds_ratio_loss,
    orpo_loss,
)

LOGPS = st.one_of(
    st.floats(max_value=0.0, allow_nan=False, allow_infinity=True),
    st.floats(-1e-5, 0.0),
    st.sampled_from([0.0, -0.0, -1e-45, -1e-12, -1e-7, LARGEST_LOGP, math.log(0.5), -1e4, -3e38, -math.inf]),
)
ORDINARY = st.floats(-30.0, -1e-3)


def test_the_loss_by_hand() -> None:
    """P(chosen) = 1/2, P(rejected) = 1/5, lambda = 0.1.

    odds(chosen) = 1, odds(rejected) = 1/4, odds ratio 4: log odds ratio log 4.
    sigmoid(log 4) = 4/5, so L_OR = -log(4/5) and L = log 2 + 0.1 * log(5/4).
    """
    chosen, rejected = torch.tensor([0.5]).log(), torch.tensor([0.2]).log()
    terms = orpo_loss(-chosen, chosen, rejected, lambda_=0.1)
    assert terms.log_odds_chosen.item() == pytest.approx(math.log(4))
    assert terms.log_odds_ratio.item() == pytest.approx(math.log(4 / 5))
    assert terms.nll.item() == pytest.approx(math.log(2))
    assert terms.loss.item() == pytest.approx(math.log(2) + 0.1 * math.log(5 / 4))
    assert odds_ratio_loss(chosen, rejected).item() == pytest.approx(math.log(5 / 4))


def test_equal_answers_cost_log_2_whatever_their_probability() -> None:
    logps = torch.tensor([0.0, -1e-9, -0.3, -7.0, -1e4])
    torch.testing.assert_close(odds_ratio_loss(logps, logps), torch.full((5,), math.log(2)))


def test_values_are_per_pair_and_fp32() -> None:
    chosen, rejected = (
        torch.tensor([-1.0, -2.0], dtype=torch.bfloat16),
        torch.tensor([-2.0, -1.0], dtype=torch.bfloat16),
    )
    terms = orpo_loss(-chosen, chosen, rejected, 0.5)
    for value in vars(terms).values():
        assert value.shape == (2,)
        assert value.dtype == torch.float32
    one = orpo_loss(-chosen[1:], chosen[1:], rejected[1:], 0.5)
    assert terms.loss[1] == one.loss[0]


@given(st.one_of(st.floats(-200.0, -1e-3), st.floats(-1e-3, 2 * LARGEST_LOGP), st.just(-1e4)))
@example(math.log(0.5))
def test_log1mexp_is_accurate(x: float) -> None:
    """Against float64, where log(-expm1(x)) and log1p(-exp(x)) are each good on their side."""
    x32 = torch.tensor(x, dtype=torch.float32)
    exact = math.log(-math.expm1(x32.item())) if x32 > -1 else math.log1p(-math.exp(x32.item()))
    assert log1mexp(x32).item() == pytest.approx(exact, rel=1e-6, abs=1e-38)
    assert log1mexp(x32.double()).item() == pytest.approx(exact, rel=1e-14, abs=1e-300)


@given(LOGPS, LOGPS)
@example(0.0, 0.0)
@example(-1e-12, -1e4)
@example(-1e4, 0.0)
def test_loss_and_gradient_are_finite_everywhere(chosen: float, rejected: float) -> None:
    """log P = 0 included; at log P = -inf the supervised loss is infinite by right, so its own input stays finite."""
    pair = torch.tensor([max(chosen, -1e30), max(rejected, -1e30)], requires_grad=True)
    terms = orpo_loss(-pair[:1], pair[:1], pair[1:], lambda_=1.0)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), pair)
    assert terms.loss.isfinite().all()
    assert gradient.isfinite().all()


@given(LOGPS, LOGPS)
def test_log_odds_never_fall_when_the_probability_rises(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert log_odds(torch.tensor(low)) <= log_odds(torch.tensor(high)) + 1e-6 * abs(max(low, -1e30))


@given(ORDINARY, ORDINARY, st.floats(0.0, 2.0))
def test_gradient_equals_the_plain_formula_in_float64(chosen: float, rejected: float, lambda_: float) -> None:
    def plain(pair: Tensor) -> Tensor:
        odds = pair.exp() / (1 - pair.exp())
        return -pair[0] - lambda_ * torch.log(1 / (1 + odds[1] / odds[0]))

    ours, theirs = (torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = orpo_loss(-ours[:1], ours[:1], ours[1:], lambda_).loss.sum()
    loss.backward()
    plain(theirs).backward()
    assert loss.item() == pytest.approx(plain(theirs).item(), rel=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-12)


def test_the_papers_gradient() -> None:
    """Section 4.3: the gradient is delta * h with delta = 1 / (1 + odds ratio) and h = dlogit/(1 - P) of each side.

    P(chosen) = 0.9, P(rejected) = 0.5: odds 9 and 1, delta = 1/10; so d/dlogP is -0.1/0.1 = -1 for the chosen side
    and +0.1/0.5 = 0.2 for the rejected.
    """
    pair = torch.tensor([0.9, 0.5], dtype=torch.float64).log().requires_grad_()
    odds_ratio_loss(pair[:1], pair[1:]).sum().backward()
    torch.testing.assert_close(pair.grad, torch.tensor([-1.0, 0.2], dtype=torch.float64))


def test_the_gradient_vanishes_as_the_chosen_odds_win() -> None:
    rejected = torch.tensor([-1.0, -5.0, -20.0, -80.0], requires_grad=True)
    odds_ratio_loss(torch.full((4,), -1.0), rejected).sum().backward()
    assert rejected.grad is not None
    assert (rejected.grad.diff() < 0).all()
    assert rejected.grad[-1] < 1e-30


@pytest.mark.parametrize("function", [log1mexp, log_odds])
def test_at_the_clamp_value_and_gradient_stand_still(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([0.0, LARGEST_LOGP / 2], requires_grad=True)
    values = function(x)
    values.sum().backward()
    assert values.tolist() == [function(torch.tensor(LARGEST_LOGP)).item()] * 2
    assert values.isfinite().all()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0]


def test_bradley_terry_by_hand() -> None:
    """Margin log 3: the chosen answer is preferred with probability 3/4, so the loss is log(4/3), its slope -1/4."""
    scores = torch.tensor([math.log(3) + 5, 5.0], requires_grad=True)
    loss = bradley_terry_loss(scores[:1], scores[1:]).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3))
    torch.testing.assert_close(scores.grad, torch.tensor([-0.25, 0.25]))


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_bradley_terry_is_finite_for_all_scores(better: float, worse: float) -> None:
    scores = torch.tensor([better, worse], requires_grad=True)
    loss = bradley_terry_loss(scores[:1], scores[1:]).sum()
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


# --- against a reference ----------------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    """beta 0.5, ratios log 9 and 0: the margin is log 3, so the loss is log(4/3), its slope -beta/4 and +beta/4."""
    ratios = torch.tensor([math.log(9), 0.0], requires_grad=True)
    loss = dpo_loss(ratios[:1], ratios[1:], beta=0.5).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3))
    torch.testing.assert_close(ratios.grad, torch.tensor([-0.125, 0.125]))


def test_ipo_by_hand() -> None:
    """tau 0.25 asks for a margin of 2; ratios 3 and 0 are one too far, which costs 1 and pulls back."""
    ratios = torch.tensor([3.0, 0.0], requires_grad=True)
    loss = ipo_loss(ratios[:1], ratios[1:], tau=0.25).sum()
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert ratios.grad is not None
    assert ratios.grad.tolist() == [2.0, -2.0]
    assert ipo_loss(torch.tensor(2.0), torch.tensor(0.0), tau=0.25).item() == 0


def test_ipo_takes_the_mean_over_tokens() -> None:
    """Sums of 6 over 2 tokens and 4 over 4 are means of 3 and 1; tau 0.25 asks for a margin of 2, and there it is."""
    pairs = _pairs(chosen_ratio=6.0, rejected_ratio=4.0, chosen_tokens=2.0, rejected_tokens=4.0)
    assert OBJECTIVES["ipo"].loss(pairs, 0.25).item() == 0


def test_kto_by_hand() -> None:
    """beta 1/2, z_0 = 1. A desirable answer of ratio 1 + log 9 is beta log 9 = log 3 over the reference point, has the
    value 3/4 and costs 1/4; at the reference point an answer costs 1/2 on either side; an undesirable one of ratio
    1 - log 9 costs 1/4, and 3/4 at 1 + log 9. A pair is the mean of its two."""
    kl, away = torch.tensor(1.0), math.log(9)
    assert kto_loss(torch.tensor(1 + away), kl, 0.5, desirable=True).item() == pytest.approx(0.25)
    assert kto_loss(torch.tensor(1.0), kl, 0.5, desirable=True).item() == 0.5
    assert kto_loss(torch.tensor(1 - away), kl, 0.5, desirable=False).item() == pytest.approx(0.25)
    for rejected, loss in ((1.0, 0.375), (1 + away, 0.5), (1 - away, 0.25)):
        pairs = _pairs(chosen_ratio=1 + away, rejected_ratio=rejected, kl=1.0)
        assert OBJECTIVES["kto"].loss(pairs, 0.5).item() == pytest.approx(loss)


def test_unlikelihood_by_hand() -> None:
    """Rejected tokens of probability 1/2 and 3/4 cost -log(1/2) and -log(1/4), so log 2 and 2 log 2 before the mean."""
    pairs = _pairs(nll=1.0, rejected_unlikelihood=1.5 * math.log(2))
    assert OBJECTIVES["unlikelihood"].loss(pairs, 2.0).item() == pytest.approx(1 + 3 * math.log(2))


def test_probability_ratio_by_hand() -> None:
    """P 3/4 against 1/4: the ratio is 3, so sigmoid(log 3) = 3/4."""
    pairs = _pairs(nll=1.0, chosen=math.log(3 / 4), rejected=math.log(1 / 4))
    assert OBJECTIVES["probability-ratio"].loss(pairs, 0.5).item() == pytest.approx(1 + 0.5 * math.log(4 / 3))


def _pairs(**values: float) -> PairLogps:
    """One pair; what is not given is NaN, so that nothing but what is declared can be used."""
    fields = dict.fromkeys(PairLogps.__dataclass_fields__, math.nan) | values
    return PairLogps(**{name: torch.tensor([value]) for name, value in fields.items()})


NEEDED = {
    "orpo": ("nll", "chosen", "rejected"),
    "sft": ("nll",),
    "probability-ratio": ("nll", "chosen", "rejected"),
    "unlikelihood": ("nll", "rejected_unlikelihood"),
    "dpo": ("chosen_ratio", "rejected_ratio"),
    "ipo": ("chosen_ratio", "rejected_ratio", "chosen_tokens", "rejected_tokens"),
    "kto": ("chosen_ratio", "rejected_ratio", "kl"),
    "reward": ("chosen", "rejected"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e4, -1e8])
def test_every_objective_and_its_gradient_are_finite_at_the_extremes(name: str, logp: float) -> None:
    """log P = 0 included, for both sides; and nothing is read that the objective has not declared to need."""
    pairs = _pairs(
        **dict.fromkeys(NEEDED[name], logp)
        | {field: 3.0 for field in NEEDED[name] if field.endswith("tokens")}
        | {field: -logp for field in NEEDED[name] if field in ("nll", "kl", "rejected_unlikelihood")}
    )
    for field in NEEDED[name]:
        getattr(pairs, field).requires_grad_()
    loss = OBJECTIVES[name].loss(pairs, 0.5)
    loss.sum().backward()
    assert loss.shape == (1,)
    assert loss.isfinite().all()
    for field in NEEDED[name]:
        gradient = getattr(pairs, field).grad
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_the_settings_say_of_an_objective_is_what_it_declares(name: str) -> None:
    assert TrainConfig(model="m", objective=name).needs_reference is OBJECTIVES[name].needs_reference  # type: ignore[arg-type]
    if OBJECTIVES[name].needs_kl:
        assert OBJECTIVES[name].needs_reference
