"""The losses: pure functions of log-probabilities, one value for each pair, nothing reduced and nothing logged.

log P(y|x) is the mean over the m response tokens of log p(y_t | x, y_<t): the geometric mean of the paper
(Hong, Lee, Thorne 2024, arXiv 2403.07691, section 4.1). All functions compute in fp32 (float64 stays float64).
A new objective is a file of a few lines here and a line in OBJECTIVES.
"""

from orpo_train.objectives.dpo import DPO, dpo_loss
from orpo_train.objectives.ipo import IPO, ipo_loss
from orpo_train.objectives.kto import KTO, kto_loss
from orpo_train.objectives.objective import Objective, PairLogps
from orpo_train.objectives.odds import LARGEST_LOGP, log1mexp, log_odds
from orpo_train.objectives.orpo import ORPO, OrpoLoss, odds_ratio_loss, orpo_loss
from orpo_train.objectives.probability_ratio import PROBABILITY_RATIO
from orpo_train.objectives.reward import REWARD, bradley_terry_loss
from orpo_train.objectives.sft import SFT
from orpo_train.objectives.unlikelihood import UNLIKELIHOOD

OBJECTIVES: dict[str, Objective] = {
    "orpo": ORPO,
    "sft": SFT,
    "probability-ratio": PROBABILITY_RATIO,
    "unlikelihood": UNLIKELIHOOD,
    "dpo": DPO,
    "ipo": IPO,
    "kto": KTO,
    "reward": REWARD,
}

__all__ = [
    "LARGEST_LOGP",
    "OBJECTIVES",
    "Objective",
    "OrpoLoss",
    "PairLogps",
    "bradley_terry_loss",
    "dpo_loss",
    "ipo_loss",
    "kto_loss",
    "log1mexp",
    "log_odds",
    "odds_ratio_loss",
    "orpo_loss",
]
