"""The training loop, top to bottom: set up, step, log, evaluate, save, finish.

The loss of a global batch is one number. Its normalisers (pairs, supervised tokens) are known from the lengths of the
whole batch before any forward pass, so neither the micro-batch size nor the number of processes changes it.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor

from orpo_data.errors import OrpoError
from orpo_train.batching import IntArray, PairDataset, batches_per_epoch, collate, global_batch, micro_batches
from orpo_train.checkpoint import RunIdentity, resume, save_checkpoint
from orpo_train.config import TrainConfig
from orpo_train.curves import draw_curves
from orpo_train.evaluate import score_pairs
from orpo_train.model import PairLogps, SequenceScorer, check_fits, load_model, pair_logps
from orpo_train.objectives import OrpoLoss, orpo_loss
from orpo_train.schedule import learning_rate_factor

METRICS_NAME, CURVES_NAME, TRAIN_NAME = "metrics.jsonl", "curves.png", "train.json"

# settings that change how fast a run goes or what it reports, never its weights
NOT_IDENTITY = {"model", "revision", "micro_batch_size", "log_every", "eval_every", "save_every", "keep_checkpoints"}
NOT_IDENTITY |= {"trackers", "trust_remote_code"}


@dataclass(frozen=True)
class TrainReport:
    """What a finished run leaves, also written as train.json."""

    steps: int
    pairs: int
    tokens: int
    metrics: dict[str, float]


def train(
    config: TrainConfig,
    train_table: pa.Table,
    eval_table: pa.Table | None,
    work_dir: Path,
    dataset_fingerprint: str,
    *,
    show_progress: bool = False,
) -> TrainReport:
    """Train on TOKENIZED pairs and leave the model, its metrics and curves in `work_dir`.

    A run that was interrupted goes on from its newest checkpoint in `work_dir`/checkpoints; on one CPU process it ends
    in the same weights, bit for bit. Raises OrpoError when data, model and settings do not fit together, or when the
    loss is not finite.
    """
    if not len(train_table):
        raise OrpoError("the train split is empty: there is nothing to train on")
    work_dir.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        log_with=config.trackers or None,
        project_dir=work_dir,
        cpu=not torch.accelerator.is_available(),
    )
    set_seed(config.seed)
    data = PairDataset(train_table)
    held_out = PairDataset(eval_table) if eval_table is not None and len(eval_table) else None
    model: Any = load_model(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    for pairs in filter(None, (data, held_out)):
        check_fits(model, pairs)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scorer, optimizer = accelerator.prepare(SequenceScorer(model), make_optimizer(model, config))
    scorer.train()

    total = total_steps(config, len(data))
    settings = config.model_dump(mode="json", by_alias=True)
    identity = RunIdentity(dataset_fingerprint, {k: v for k, v in settings.items() if k not in NOT_IDENTITY})
    checkpoints = work_dir / "checkpoints"
    first = resume(checkpoints, accelerator.unwrap_model(scorer).model, optimizer.optimizer, identity)
    log = MetricsLog(work_dir / METRICS_NAME, first, accelerator)
    if config.trackers:
        accelerator.init_trackers("orpo", {k: v for k, v in settings.items() if not isinstance(v, list)})

    with _progress(total, first, show_progress and accelerator.is_main_process) as advance:
        for step in range(first, total):
            metrics = optimizer_step(accelerator, scorer, optimizer, data, config, step, total)
            done = step + 1
            if done % config.log_every == 0 or done == total:
                log.write(done, metrics)
            if held_out and (done == total or (config.eval_every and done % config.eval_every == 0)):
                log.write(done, evaluation_metrics(accelerator, scorer, held_out, config))
            if config.save_every and done % config.save_every == 0 and accelerator.is_main_process:
                bare = accelerator.unwrap_model(scorer).model
                save_checkpoint(checkpoints, done, bare, optimizer.optimizer, identity, config.keep_checkpoints)
            advance(metrics)

    report = TrainReport(total, *seen(total, config, data), metrics=log.last())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(scorer).model.save_pretrained(work_dir)
        draw_curves(work_dir / CURVES_NAME, log.training, log.evaluations)
        finished = {"config": settings, "dataset": dataset_fingerprint, **vars(report)}
        (work_dir / TRAIN_NAME).write_text(json.dumps(finished, indent=2) + "\n")
    if config.trackers:
        accelerator.end_training()
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # what follows in this process may load a model of its own
    return report


def process_state() -> PartialState:
    """Rank and number of processes as the launcher set them; without an accelerator they meet over gloo on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def optimizer_step(
    accelerator: Accelerator,
    scorer: torch.nn.Module,
    optimizer: Any,
    data: PairDataset,
    config: TrainConfig,
    step: int,
    total: int,
) -> dict[str, float]:
    """One global batch: forward and backward in micro-batches, one update. Returns the batch's metrics."""
    batch = global_batch(len(data), config.batch_size, config.seed, step)
    lengths = data.lengths["chosen"] + data.lengths["rejected"]
    rank, world = accelerator.process_index, accelerator.num_processes
    micros = micro_batches(batch, lengths, config.micro_batch_size, rank, world)
    # dropout draws from (seed, step, process), so a resumed run draws the same
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0]))
    sums = torch.zeros(len(METRICS), device=accelerator.device)
    for index, micro in enumerate(micros):
        last = index == len(micros) - 1
        with nullcontext() if last else accelerator.no_sync(scorer):
            rows = collate(data, micro.pairs, config.nll_scope).to(accelerator.device)
            logps = pair_logps(scorer(rows), rows)
            terms = pair_losses(logps, data.nll_tokens(batch, config.nll_scope), len(batch), config)
            # processes average their gradients; the sum over all of them is wanted
            accelerator.backward(terms.loss.sum() * micro.weight * world)
        sums += metric_sums(terms, logps, config.weight_of_odds) * micro.weight
    grad_norm = accelerator.clip_grad_norm_(scorer.parameters(), config.max_grad_norm)
    rate = config.learning_rate * learning_rate_factor(config.schedule, step, config.warmup(total), total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    values = accelerator.reduce(sums, reduction="sum").tolist()
    metrics = {name: values[i] / (1 if name == "loss" else len(batch)) for i, name in enumerate(METRICS)}
    if not (math.isfinite(metrics["loss"]) and math.isfinite(float(grad_norm))):
        raise OrpoError(
            f"step {step + 1}: the loss is {metrics['loss']}, the gradient's norm {float(grad_norm)}; "
            "lower train.learning_rate or look at the batch's rows"
        )
    optimizer.step()
    optimizer.zero_grad()
    tokens = int(lengths[batch].sum())
    return metrics | {"grad_norm": float(grad_norm), "learning_rate": rate, "tokens": tokens, "pairs": len(batch)}


def pair_losses(logps: PairLogps, nll_tokens: int, pairs: int, config: TrainConfig) -> OrpoLoss:
    """The terms of each pair, `loss` scaled such that its sum over the global batch is the batch's loss.

    sequence: (1/N) sum_i [nll_i + lambda * or_i] with nll_i a mean over the sequence's own tokens;
    token: sum of all token losses / all tokens of the batch + lambda * (1/N) sum_i or_i.
    """
    means = logps.nll_sum / logps.nll_tokens
    terms = orpo_loss(means, logps.chosen, logps.rejected, config.weight_of_odds)
    if config.nll_reduction == "sequence":
        loss = terms.loss / pairs
    else:
        loss = logps.nll_sum / nll_tokens - config.weight_of_odds * terms.log_odds_ratio / pairs
    return OrpoLoss(loss, terms.nll, terms.log_odds_ratio, terms.log_odds_chosen)


METRICS = (
    "loss",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
)


def metric_sums(terms: OrpoLoss, logps: PairLogps, weight: float) -> Tensor:
    """Sums over the pairs in the order of METRICS; a reward is lambda times a mean log-probability."""
    margin = logps.chosen - logps.rejected
    columns = (
        terms.loss,
        terms.nll,
        terms.log_odds_ratio,
        terms.log_odds_chosen,
        logps.chosen,
        logps.rejected,
        weight * logps.chosen,
        weight * logps.rejected,
        (margin > 0).float(),
        weight * margin,
    )
    return torch.stack([column.detach().float().sum() for column in columns])


def evaluation_metrics(
    accelerator: Accelerator, scorer: torch.nn.Module, data: PairDataset, config: TrainConfig
) -> dict[str, float]:
    """The same metrics over the held-out pairs, as eval/...; each process scores its share."""
    everything = np.arange(len(data))
    mine: IntArray = everything[accelerator.process_index :: accelerator.num_processes]
    # the bare scorer: DDP's own forward waits for the other processes, which may have fewer passes or none
    scores = score_pairs(accelerator.unwrap_model(scorer), data, mine, config.nll_scope)
    columns = (scores.chosen, scores.rejected, scores.nll_sum, scores.nll_tokens)
    logps = PairLogps(*(torch.from_numpy(column) for column in columns))
    terms = pair_losses(logps, data.nll_tokens(everything, config.nll_scope), len(data), config)
    sums = metric_sums(terms, logps, config.weight_of_odds).to(accelerator.device)
    values = accelerator.reduce(sums, reduction="sum").tolist()
    return {f"eval/{name}": values[i] / (1 if name == "loss" else len(data)) for i, name in enumerate(METRICS)}


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; decay acts on matrices, not on biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)


def total_steps(config: TrainConfig, pairs: int) -> int:
    """Optimizer steps of a run; a last short batch of an epoch is a step too."""
    steps = config.epochs * batches_per_epoch(pairs, config.batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps


def seen(steps: int, config: TrainConfig, data: PairDataset) -> tuple[int, int]:
    """Pairs and tokens that `steps` optimizer steps read, repeats counted."""
    lengths = data.lengths["chosen"] + data.lengths["rejected"]
    batches = [global_batch(len(data), config.batch_size, config.seed, step) for step in range(steps)]
    return sum(len(batch) for batch in batches), int(sum(lengths[batch].sum() for batch in batches))


class MetricsLog:
    """metrics.jsonl and the trackers; after a resume the file goes on from the checkpoint's step."""

    def __init__(self, path: Path, first: int, accelerator: Accelerator) -> None:
        self._path, self._accelerator = path, accelerator
        whole = path.read_text().split("\n")[:-1] if path.exists() and first else []  # a torn last line has no end
        lines = [json.loads(line) for line in whole]
        self.lines: list[dict[str, Any]] = [line for line in lines if line["step"] <= first]
        if accelerator.is_main_process:
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            partial.replace(path)  # killed here, or read by another process, the old lines are still whole

    def write(self, step: int, metrics: dict[str, float]) -> None:
        line = {"step": step, **metrics}
        self.lines.append(line)
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._accelerator.log(metrics, step=step)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "eval/loss" in line]

    @property
    def training(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "loss" in line]

    def last(self) -> dict[str, float]:
        """The newest training line and evaluation in one."""
        newest = [*self.training[-1:], *self.evaluations[-1:]]
        return {name: value for line in newest for name, value in line.items() if name != "step"}


@contextmanager
def _progress(total: int, first: int, shown: bool) -> Iterator[Any]:
    """A progress bar on stderr with the newest loss; nothing when not shown."""
    if not shown:
        yield lambda metrics: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=first, note="")

        def advance(metrics: dict[str, float]) -> None:
            note = f"loss {metrics['loss']:.3f}  log odds ratio {metrics['log_odds_chosen']:+.3f}"
            bar.update(task, advance=1, note=note)

        yield advance
