"""The training loop, top to bottom: set up, step, log, evaluate, save, finish."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from orpo_data.errors import OrpoError
from orpo_train.adapters import merge_lora
from orpo_train.batching import PairDataset
from orpo_train.checkpoint import (
    METRICS_NAME,
    RunIdentity,
    load_best,
    prune,
    resume,
    save_best,
    save_checkpoint,
    saved_metrics,
    trained_weights,
)
from orpo_train.config import TrainConfig
from orpo_train.curves import draw_curves
from orpo_train.metrics import MetricsLog
from orpo_train.ppo import PpoRun, ppo_evaluation, ppo_step, set_up_ppo
from orpo_train.run import Run, set_up
from orpo_train.step import evaluation_metrics, optimizer_step

CURVES_NAME, TRAIN_NAME, NONFINITE_NAME = "curves.png", "train.json", "nonfinite.jsonl"

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
    forward_passes: int  # sequences that ran through a model in these steps
    layout: str  # how pairs lay in memory: flex, sdpa or plain
    metrics: dict[str, float]  # those of the exported step


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
        begin = set_up_ppo if config.objective == "ppo" else set_up
        run = begin(config, train_table, eval_table, work_dir)
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


def run_steps(
    run: Run, identity: RunIdentity, settings: dict[str, Any], work_dir: Path, *, show_progress: bool
) -> tuple[dict[str, Tensor], TrainReport]:
    """All optimizer steps from the newest checkpoint on: the weights to export, and what happened."""
    config, accelerator = run.config, run.accelerator
    checkpoints = work_dir / "checkpoints"
    step = resume(checkpoints, run.trained, run.optimizer.optimizer, identity)
    log = MetricsLog(work_dir / METRICS_NAME, saved_metrics(checkpoints, step), accelerator)
    run.restore(log.lines)
    if config.trackers:
        accelerator.init_trackers("orpo", {k: v for k, v in settings.items() if isinstance(v, str | float | int)})
    saved, nonfinite = step, 0

    def evaluate(held_out: PairDataset) -> None:
        judged = ppo_evaluation(run, held_out) if isinstance(run, PpoRun) else evaluation_metrics(run, held_out)
        log.write(step, judged)
        if config.export == "best" and log.best() == step:
            save_best(checkpoints, step, run.model, identity, writes=accelerator.is_main_process)

    with _progress(run.total, step, show_progress and accelerator.is_main_process) as advance:
        if run.held_out and config.eval_every and step == 0:
            evaluate(run.held_out)  # what training starts from
        while step < run.total and not stops_early(log, config):
            metrics = ppo_step(run, step) if isinstance(run, PpoRun) else optimizer_step(run, step)
            step += 1
            nonfinite = 0 if "loss" in metrics else nonfinite + 1
            # not after a step that was not taken: how many there were in a row is nowhere saved
            saves = config.save_every is not None and step % config.save_every == 0 and not nonfinite
            if nonfinite:
                report_nonfinite(run, step, nonfinite, metrics, work_dir / NONFINITE_NAME)
            elif step % config.log_every == 0 or step == run.total or saves:
                log.write(step, metrics)
            if run.held_out and (step == run.total or (config.eval_every and step % config.eval_every == 0)):
                evaluate(run.held_out)
            if saves:
                writes = accelerator.is_main_process
                state = run.trained, run.optimizer.optimizer, identity
                save_checkpoint(checkpoints, step, *state, writes=writes, metrics=log.lines)
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
    report = TrainReport(step, exported, **run.seen(step), layout=run.layout, metrics=log.last(exported))
    return weights, report


def stops_early(log: MetricsLog, config: TrainConfig) -> bool:
    return config.early_stopping is not None and log.evaluations_without_gain() >= config.early_stopping


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


def export_model(run: Run, weights: dict[str, Tensor], work_dir: Path) -> None:
    """The model as transformers saves it: safetensors, configuration, generation configuration."""
    if run.config.lora:
        merge_lora(weights, run.config).save_pretrained(work_dir)
    else:
        run.model.save_pretrained(work_dir, state_dict=saved_buffers(run.model) | weights)


def saved_buffers(model: Any) -> dict[str, Tensor]:
    """What a model's files hold beside its weights: the biases of an expert router, for example."""
    made_anew = dict(model.named_non_persistent_buffers())  # state_dict() would tell too, and free what FSDP gathered
    return {name: buffer for name, buffer in model.named_buffers() if name not in made_anew}


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
