"""Supervised fine-tuning on the chosen answers: what ORPO is compared with, and its own first term."""

from orpo_train.objectives.objective import Objective

SFT = Objective(lambda pairs, lambda_: pairs.nll, needs_rejected=False)
