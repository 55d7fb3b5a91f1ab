"""Odds ratio preference optimization (Hong, Lee, Thorne 2024, arXiv 2403.07691)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_train.objectives.objective import Objective, PairLogps
from orpo_train.objectives.odds import full_precision, log_odds


def odds_ratio_loss(chosen_logp: Tensor, rejected_logp: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)) (equation 7), from mean log-probabilities [pairs]."""
    return -logsigmoid(log_odds(chosen_logp) - log_odds(rejected_logp))


@dataclass(frozen=True)
class OrpoLoss:
    """Each of shape [pairs], fp32. The names are those TRL logs; `loss` alone carries the gradient that matters."""

    loss: Tensor  # nll + lambda * -log_odds_ratio
    nll: Tensor
    log_odds_ratio: Tensor  # log sigmoid of the log odds ratio, <= 0
    log_odds_chosen: Tensor  # the log odds ratio itself, > 0 when the chosen answer has the better odds


def orpo_loss(nll: Tensor, chosen_logp: Tensor, rejected_logp: Tensor, lambda_: float) -> OrpoLoss:
    """L = L_SFT + lambda * L_OR for each pair (equation 6).

    Args:
        nll: supervised loss of the chosen answer, [pairs]; the paper's is `-chosen_logp`.
        chosen_logp, rejected_logp: mean log-probability of the response tokens, [pairs], <= 0.
        lambda_: weight of the odds ratio loss.

    >>> half = torch.tensor([0.5]).log()
    >>> orpo_loss(-half, half, half, lambda_=0.1).loss   # log 2 + 0.1 * log 2
    tensor([0.7625])
    """
    log_odds_chosen = log_odds(chosen_logp) - log_odds(rejected_logp)
    log_odds_ratio = logsigmoid(log_odds_chosen)
    nll = full_precision(nll)
    return OrpoLoss(nll - lambda_ * log_odds_ratio, nll, log_odds_ratio, log_odds_chosen)


def _loss(pairs: PairLogps, lambda_: float) -> Tensor:
    return orpo_loss(pairs.nll, pairs.chosen, pairs.rejected, lambda_).loss


ORPO = Objective(_loss)
