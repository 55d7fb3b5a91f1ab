"""The training loop, top to bottom: set up, step, log, evaluate, save, finish.

The loss of a global batch is one number. Its normalisers (pairs, supervised tokens) are known from the lengths of the
whole batch before any forward pass, so neither the micro-batches nor the number of processes change it.
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
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor

from orpo_data.errors import OrpoError
from orpo_train import zero
from orpo_train.adapters import attach_lora, load_base, merge_lora
from orpo_train.batching import (
    SIDES,
    BatchOrder,
    IntArray,
    Limits,
    PairDataset,
    batches_per_epoch,
    check_limits,
    micro_batches,
)
from orpo_train.checkpoint import (
    RunIdentity,
    load_best,
    prune,
    resume,
    save_best,
    save_checkpoint,
    trained_weights,
)
from orpo_train.config import TrainConfig
from orpo_train.curves import draw_curves
from orpo_train.evaluate import score_pairs
from orpo_train.metrics import CHOSEN_METRICS, METRICS, MetricsLog, metric_sums
from orpo_train.model import PLAIN, PairSums, SequenceScorer, check_fits, choose_layout, pair_sums
from orpo_train.objectives import OBJECTIVES, Objective, PairLogps
from orpo_train.schedule import learning_rate_factor

METRICS_NAME, CURVES_NAME, TRAIN_NAME, NONFINITE_NAME = "metrics.jsonl", "curves.png", "train.json", "nonfinite.jsonl"

# settings that change how fast a run goes, when it reports or which of its weights are kept, never a step's weights
NOT_IDENTITY = {"model", "revision", "micro_batch_tokens", "micro_batch_size", "layout", "compile", "log_every"}
NOT_IDENTITY |= {"eval_every", "save_every", "keep_checkpoints", "export", "early_stopping", "resume_other_dataset"}
NOT_IDENTITY |= {"gradient_checkpointing", "nonfinite_steps", "trackers", "trust_remote_code"}


@dataclass(frozen=True)
class TrainReport:
    """What a finished run leaves, also written as train.json."""

    steps: int  # optimizer steps that ran; fewer than planned after an early stop
    exported_step: int  # the step whose weights became the model
    pairs: int  # read in these steps, repeats counted
    tokens: int
    layout: str  # how pairs lay in memory: flex, sdpa or plain
    metrics: dict[str, float]  # those of the exported step


@dataclass(frozen=True)
class Run:
    """Everything a step needs."""

    config: TrainConfig
    accelerator: Accelerator
    scorer: torch.nn.Module
    optimizer: Any
    data: PairDataset
    held_out: PairDataset | None
    order: BatchOrder
    layout: str
    total: int  # planned optimizer steps

    @property
    def model(self) -> Any:
        return self.bare_scorer.model

    @property
    def bare_scorer(self) -> SequenceScorer:
        return self.accelerator.unwrap_model(self.scorer)  # type: ignore[no-any-return]

    @property
    def zero(self) -> bool:
        return zero.in_use(self.accelerator)

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.config.objective]

    @property
    def sides(self) -> tuple[str, ...]:
        return sides_of(self.config)

    @property
    def limits(self) -> Limits:
        return Limits(self.config.micro_batch_tokens, self.config.micro_batch_size)


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
    in the same weights, bit for bit. Raises OrpoError when data, model and settings do not fit together, when memory
    does not suffice, or when the loss is not finite several steps in a row.
    """
    if not len(train_table):
        raise OrpoError("the train split is empty: there is nothing to train on")
    work_dir.mkdir(parents=True, exist_ok=True)
    with explained_memory_errors(config):
        run = set_up(config, train_table, eval_table, work_dir)
        settings = config.model_dump(mode="json", by_alias=True)
        own = {name: value for name, value in settings.items() if name not in NOT_IDENTITY}
        identity = RunIdentity(dataset_fingerprint, own, config.resume_other_dataset)
        weights, report = run_steps(run, identity, settings, work_dir, show_progress=show_progress)
        if run.accelerator.is_main_process:
            export_model(run, weights, work_dir)
    if run.accelerator.is_main_process:
        finished = {"config": settings, "dataset": dataset_fingerprint, **vars(report)}
        (work_dir / TRAIN_NAME).write_text(json.dumps(finished, indent=2) + "\n", encoding="utf-8")
    if config.trackers:
        run.accelerator.end_training()
    run.accelerator.wait_for_everyone()
    run.accelerator.free_memory()  # what follows in this process may load a model of its own
    return report


def sides_of(config: TrainConfig) -> tuple[str, ...]:
    """The sides of a pair that training runs through the model."""
    return SIDES if OBJECTIVES[config.objective].needs_rejected else SIDES[:1]


def process_state() -> PartialState:
    """Rank and number of processes as the launcher set them; without an accelerator they meet over gloo on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def set_up(config: TrainConfig, train_table: pa.Table, eval_table: pa.Table | None, work_dir: Path) -> Run:
    """Model, data and optimizer, checked against each other before any step."""
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run may have left another configuration
    accelerator = Accelerator(
        mixed_precision="no",  # the scorer sees to it
        log_with=config.trackers or None,
        project_dir=work_dir,
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if zero.in_use(accelerator):
        zero.configure(accelerator, config)
    set_seed(config.seed)
    data = PairDataset(train_table)
    held_out = PairDataset(eval_table) if eval_table is not None and len(eval_table) else None
    model: Any = load_base(config).to(accelerator.device)
    for pairs in filter(None, (data, held_out)):
        check_fits(model, pairs)
    layout = choose_layout(model, data, config.layout)
    check_limits(data, sides_of(config), config.micro_batch_tokens, packed=layout != PLAIN)
    if held_out is not None:
        check_limits(held_out, SIDES, config.micro_batch_tokens, packed=layout != PLAIN)
    if config.lora:
        attach_lora(model, config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        compile_layers(model)
    bare, optimizer = SequenceScorer(model, layout, config.precision), make_optimizer(model, config)
    if zero.in_use(accelerator):
        zero.announce_head(bare)
    scorer, optimizer = accelerator.prepare(bare, optimizer)
    scorer.train()
    order = BatchOrder(data, config.batch_size, config.seed)
    return Run(config, accelerator, scorer, optimizer, data, held_out, order, layout, total_steps(config, len(data)))


def run_steps(
    run: Run, identity: RunIdentity, settings: dict[str, Any], work_dir: Path, *, show_progress: bool
) -> tuple[dict[str, Tensor], TrainReport]:
    """All optimizer steps from the newest checkpoint on: the weights to export, and what happened."""
    config, accelerator = run.config, run.accelerator
    checkpoints = work_dir / "checkpoints"
    step = resume(checkpoints, run.model, run.optimizer.optimizer, identity)
    log = MetricsLog(work_dir / METRICS_NAME, step, accelerator)
    if config.trackers:
        accelerator.init_trackers("orpo", {k: v for k, v in settings.items() if isinstance(v, str | float | int)})
    saved, nonfinite = step, 0

    def evaluate() -> None:
        log.write(step, evaluation_metrics(run, run.held_out))
        if config.export == "best" and log.best() == step:
            save_best(checkpoints, step, run.model, identity, writes=accelerator.is_main_process)

    with _progress(run.total, step, show_progress and accelerator.is_main_process) as advance:
        if run.held_out and config.eval_every and step == 0:
            evaluate()  # what training starts from
        while step < run.total and not stops_early(log, config):
            metrics = optimizer_step(run, step)
            step += 1
            nonfinite = 0 if "loss" in metrics else nonfinite + 1
            if nonfinite:
                report_nonfinite(run, step, nonfinite, metrics, work_dir / NONFINITE_NAME)
            elif step % config.log_every == 0 or step == run.total:
                log.write(step, metrics)
            if run.held_out and (step == run.total or (config.eval_every and step % config.eval_every == 0)):
                evaluate()
            if config.save_every and step % config.save_every == 0:
                writes = accelerator.is_main_process
                save_checkpoint(checkpoints, step, run.model, run.optimizer.optimizer, identity, writes=writes)
                saved = step
            if accelerator.is_main_process:
                prune(checkpoints, config.keep_checkpoints, {log.best(), log.best(until=saved)})
            advance(metrics)
    best = log.best() if config.export == "best" else None
    exported = step if best is None else best
    accelerator.wait_for_everyone()  # the best weights are written
    weights = trained_weights(run.model) if best is None else load_best(checkpoints, best, identity)
    if accelerator.is_main_process:
        draw_curves(work_dir / CURVES_NAME, log.training, log.evaluations)
    report = TrainReport(step, exported, *seen(run, step), layout=run.layout, metrics=log.last(exported))
    return weights, report


def stops_early(log: MetricsLog, config: TrainConfig) -> bool:
    return config.early_stopping is not None and log.evaluations_without_gain() >= config.early_stopping


def optimizer_step(run: Run, step: int) -> dict[str, float]:
    """One global batch: forward and backward in micro-batches, one update. Returns the batch's metrics.

    When the loss or the gradient is not finite, the weights stay as they are and the metrics have no `loss`.
    """
    config, accelerator, world = run.config, run.accelerator, run.accelerator.num_processes
    batch = run.order.batch(step)
    nll_tokens = run.data.nll_tokens(batch, config.nll_scope)
    packed = run.layout != PLAIN
    mine = micro_batches(run.data, batch, run.sides, run.limits, packed=packed, multiple=world)
    mine = mine[accelerator.process_index :: world]
    # dropout draws from (seed, step, process), so a resumed run draws the same
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, accelerator.process_index]).generate_state(1)[0]))
    sums = torch.zeros(len(METRICS), device=accelerator.device)
    for index, micro in enumerate(mine):
        last = index == len(mine) - 1
        with nullcontext() if last else accelerator.no_sync(run.scorer):
            rows = run.bare_scorer.collate(run.data, micro.trees, config.nll_scope).to(accelerator.device)
            logps = reduced(pair_sums(run.scorer(rows), rows), config.nll_reduction, nll_tokens, len(batch))
            losses = run.objective.loss(logps, config.lambda_)
            # the mean over the global batch; processes average their gradients, the sum over all of them is wanted
            loss = losses.sum() * (micro.weight * world / len(batch))
            if run.zero:
                zero.backward(run.scorer, loss, last=last)
            else:
                accelerator.backward(loss)
        sums += metric_sums(losses, logps, config.lambda_) * micro.weight
    rate = config.learning_rate * learning_rate_factor(config.schedule, step, config.warmup(run.total), run.total)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    metrics = named_means(accelerator.reduce(sums, reduction="sum"), len(batch), run.objective)
    grad_norm = update(run, finite=math.isfinite(metrics["loss"]))
    facts = {"grad_norm": grad_norm, "learning_rate": rate, "tokens": tokens_of(run, batch), "pairs": len(batch)}
    return metrics | facts if math.isfinite(metrics["loss"]) and math.isfinite(grad_norm) else facts


def update(run: Run, *, finite: bool) -> float:
    """Clip and step, unless the loss (`finite`) or the gradient is not finite; returns the gradient's norm."""
    if run.zero:
        return zero.step(run.scorer)
    norm = float(run.accelerator.clip_grad_norm_(run.scorer.parameters(), run.config.max_grad_norm))
    if finite and math.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


def reduced(sums: PairSums, reduction: str, nll_tokens: int, pairs: int) -> PairLogps:
    """Pairs with their supervised loss such that its mean over the global batch is L_SFT.

    sequence: the mean over a sequence's own tokens; token: its sum, over the mean number of tokens in the batch, so
    that the batch's mean is the sum of all token losses over all tokens.
    """
    nll = sums.nll_sum / (sums.nll_tokens if reduction == "sequence" else nll_tokens / pairs)
    return PairLogps(nll, sums.chosen, sums.rejected)


def named_means(sums: Tensor, pairs: int, objective: Objective) -> dict[str, float]:
    """The metrics of a batch; without rejected answers only what the chosen ones tell."""
    values = dict(zip(METRICS, (sums / pairs).tolist(), strict=True))
    return values if objective.needs_rejected else {name: values[name] for name in CHOSEN_METRICS}


def report_nonfinite(run: Run, step: int, in_a_row: int, facts: dict[str, float], path: Path) -> None:
    """Write down the rows of a batch whose step was not taken; OrpoError when it is one too many in a row."""
    ids = run.data.row_ids(run.order.batch(step - 1))
    if run.accelerator.is_main_process:
        line = {"step": step, "grad_norm": str(facts["grad_norm"]), "learning_rate": facts["learning_rate"], "ids": ids}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if in_a_row >= run.config.nonfinite_steps:
        raise OrpoError(
            f"step {step}: loss or gradient not finite, {in_a_row} steps in a row; the batch's rows are "
            f"{', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''} (all in {path}); "
            "lower train.learning_rate or look at these rows"
        )


def evaluation_metrics(run: Run, data: PairDataset | None) -> dict[str, float]:
    """The metrics over the held-out pairs, both sides, as eval/...; each process scores its share."""
    assert data is not None
    accelerator, config = run.accelerator, run.config
    place = (accelerator.process_index, accelerator.num_processes)
    everything: IntArray = np.arange(len(data))
    scores = score_pairs(run.bare_scorer, data, everything, config.nll_scope, run.limits, *place)
    nll_tokens = data.nll_tokens(everything, config.nll_scope)
    logps = reduced(scores.sums(), config.nll_reduction, nll_tokens, len(data))
    sums = metric_sums(run.objective.loss(logps, config.lambda_), logps, config.lambda_).to(accelerator.device)
    values = (accelerator.reduce(sums, reduction="sum") / len(data)).tolist()
    return {f"eval/{name}": value for name, value in zip(METRICS, values, strict=True)}


def export_model(run: Run, weights: dict[str, Tensor], work_dir: Path) -> None:
    """The model as transformers saves it: safetensors, configuration, generation configuration."""
    if run.config.lora:
        merge_lora(weights, run.config).save_pretrained(work_dir)
    else:
        run.model.save_pretrained(work_dir, state_dict=weights)


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; decay acts on matrices, not on biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def compile_layers(model: Any) -> None:
    """torch.compile of each layer by itself: they share one compilation, and attention stays outside of it."""
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            module.compile(dynamic=True)


def total_steps(config: TrainConfig, pairs: int) -> int:
    """Optimizer steps of a run; a last short batch of an epoch is a step too."""
    steps = config.epochs * batches_per_epoch(pairs, config.batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps


def seen(run: Run, steps: int) -> tuple[int, int]:
    """Pairs and tokens that `steps` optimizer steps read, repeats counted."""
    batches = [run.order.batch(step) for step in range(steps)]
    return sum(map(len, batches)), sum(tokens_of(run, batch) for batch in batches)


def tokens_of(run: Run, batch: IntArray) -> int:
    """Tokens of a batch's sequences, those of a shared prompt counted with each."""
    return sum(int(run.data.lengths[side][batch].sum()) for side in run.sides)


@contextmanager
def explained_memory_errors(config: TrainConfig) -> Iterator[None]:
    """Running out of memory as one line that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise OrpoError(
                f"not enough memory: lower train.micro_batch_tokens (it is {config.micro_batch_tokens}), set "
                "train.gradient_checkpointing, or train adapters only (train.lora)"
            ) from None
        raise


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
            shown = (("loss", "loss {:.3f}"), ("log_odds_chosen", "log odds ratio {:+.3f}"))
            note = "  ".join(text.format(metrics[name]) for name, text in shown if name in metrics)
            bar.update(task, advance=1, note=note or "not finite, step not taken")

        yield advance
