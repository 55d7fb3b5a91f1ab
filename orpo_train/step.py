"""One optimizer step, and an evaluation: what turns pairs into an update and into figures.

The loss of a global batch is one number. Its normalisers (pairs, supervised tokens) are known from the lengths of the
whole batch before any forward pass, so neither the micro-batches nor the number of processes change it.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orpo_data.schema import ANSWERS
from orpo_train import zero
from orpo_train.batching import IntArray, PairDataset, micro_batches
from orpo_train.evaluate import forward_passes
from orpo_train.layout import Batch
from orpo_train.metrics import COLUMNS, metric_sums, named_means, names_of
from orpo_train.model import PLAIN, PairSums
from orpo_train.objectives import PairLogps
from orpo_train.run import Run
from orpo_train.schedule import learning_rate_factor


def optimizer_step(run: Run, step: int) -> dict[str, float]:
    """One global batch: forward and backward in micro-batches, one update. Returns the batch's metrics.

    When the loss or the gradient is not finite, the weights stay as they are and the metrics have no `loss`.
    """
    config, accelerator, world = run.config, run.accelerator, run.accelerator.num_processes
    batch = run.order.batch(step)
    nll = NllMean(config.nll_reduction, run.data.nll_tokens(batch, config.nll_scope), len(batch))
    packed = run.layout != PLAIN
    mine = micro_batches(run.data, batch, run.sides, run.limits, packed=packed, multiple=world)
    mine = mine[accelerator.process_index :: world]
    # dropout draws from (seed, step, process), so a resumed run draws the same
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, accelerator.process_index]).generate_state(1)[0]))
    kl = kl_estimate(run, run.data, batch)
    sums = torch.zeros(len(COLUMNS), device=accelerator.device)
    for index, micro in enumerate(mine):
        last = index == len(mine) - 1
        with nullcontext() if last else accelerator.no_sync(run.scorer):
            rows = run.bare_scorer.collate(run.data, micro.trees, config.nll_scope).to(accelerator.device)
            pairs = pair_logps(run.bare_scorer.sums(run.scorer(rows), rows), rows, nll, kl)
            losses = run.objective.loss(pairs, run.weight)
            # the mean over the global batch; processes average their gradients, the sum over all of them is wanted
            loss = losses.sum() * (micro.weight * world / len(batch))
            if run.zero:
                zero.backward(run.scorer, loss, last=last)
            else:
                accelerator.backward(loss)
        sums += metric_sums(losses, pairs, run.objective, run.weight) * micro.weight
    rate = set_learning_rate(run, step)
    names = names_of(run.objective, both_sides=run.objective.needs_rejected)
    metrics = named_means(accelerator.reduce(sums, reduction="sum"), len(batch), names)
    grad_norm = update(run, finite=math.isfinite(metrics["loss"]))
    facts = {"grad_norm": grad_norm, "learning_rate": rate, "tokens": run.tokens_of(batch), "pairs": len(batch)}
    return metrics | facts if math.isfinite(metrics["loss"]) and math.isfinite(grad_norm) else facts


def set_learning_rate(run: Run, step: int) -> float:
    """That of optimizer step `step`, from 0."""
    config = run.config
    rate = config.learning_rate * learning_rate_factor(config.schedule, step, config.warmup(run.total), run.total)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    return rate


def update(run: Run, *, finite: bool) -> float:
    """Clip and step, unless the loss (`finite`) or the gradient is not finite; returns the gradient's norm."""
    if run.zero:
        return zero.step(run.scorer)
    norm = float(run.accelerator.clip_grad_norm_(run.scorer.parameters(), run.config.max_grad_norm))
    if finite and math.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


@dataclass(frozen=True)
class NllMean:
    """How the supervised loss of a global batch is averaged."""

    reduction: str  # sequence: over each sequence, then over the pairs; token: over all tokens of the batch
    tokens: int  # that it covers in the whole batch
    pairs: int

    def of(self, sums: PairSums) -> Tensor:
        """The pairs' supervised losses, [B]: their mean over the global batch is L_SFT."""
        return sums.nll_sum / (sums.nll_tokens if self.reduction == "sequence" else self.tokens / self.pairs)


def pair_logps(sums: PairSums, batch: Batch, nll: NllMean, kl: Tensor) -> PairLogps:
    """What an objective sees of a forward pass over `batch`."""
    chosen_reference, rejected_reference = batch.reference.unbind(1)
    return PairLogps(
        nll=nll.of(sums),
        chosen=sums.chosen,
        rejected=sums.rejected,
        chosen_tokens=sums.chosen_tokens,
        rejected_tokens=sums.rejected_tokens,
        rejected_unlikelihood=sums.rejected_unlikelihood,
        chosen_ratio=sums.chosen * sums.chosen_tokens - chosen_reference,
        rejected_ratio=sums.rejected * sums.rejected_tokens - rejected_reference,
        kl=kl.expand_as(sums.chosen),
    )


def kl_estimate(run: Run, data: PairDataset, pairs: IntArray) -> Tensor:
    """How far the model has moved from the reference on answers to other prompts, >= 0; NaN where nobody asks.

    The mean over all pairs of the global batch of log pi(y'|x) - log pi_ref(y'|x), so it is one number for them all.
    """
    if not run.objective.needs_kl:
        return torch.tensor(torch.nan, device=run.accelerator.device)
    total = torch.zeros((), device=run.accelerator.device)
    place = (run.accelerator.process_index, run.accelerator.num_processes)
    for micro, batch, values in forward_passes(
        run.bare_scorer, data.kl, pairs, "response", run.limits, *place, sides=ANSWERS[:1]
    ):
        sums = run.bare_scorer.sums(values, batch)
        total += (sums.chosen * sums.chosen_tokens - batch.reference[:, 0]).sum() * micro.weight
    whole: Tensor = run.accelerator.reduce(total, reduction="sum")
    return (whole / len(pairs)).clamp(min=0)


def evaluation_metrics(run: Run, data: PairDataset) -> dict[str, float]:
    """The metrics over the held-out pairs, both sides, as eval/...; each process runs its share."""
    accelerator, config = run.accelerator, run.config
    everything: IntArray = np.arange(len(data))
    nll = NllMean(config.nll_reduction, data.nll_tokens(everything, config.nll_scope), len(data))
    kl = kl_estimate(run, data, everything)
    place = (accelerator.process_index, accelerator.num_processes)
    sums = torch.zeros(len(COLUMNS), device=accelerator.device)
    for micro, batch, values in forward_passes(run.bare_scorer, data, everything, config.nll_scope, run.limits, *place):
        pairs = pair_logps(run.bare_scorer.sums(values, batch), batch, nll, kl)
        sums += metric_sums(run.objective.loss(pairs, run.weight), pairs, run.objective, run.weight) * micro.weight
    names = names_of(run.objective, both_sides=True)
    means = named_means(accelerator.reduce(sums, reduction="sum"), len(data), names)
    return {f"eval/{name}": value for name, value in means.items()}
