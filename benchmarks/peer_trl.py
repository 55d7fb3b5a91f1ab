"""TRL's ORPOTrainer on our token ids: its own collator, forward pass, loss, optimizer and loop.

Its tokenization is left out: the trainer is made with one row of text, and then given rows in the form that its own
`tokenize_row` makes, in the order of our global batches. Everything after that is TRL's and transformers' own.
"""

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks.measure import Job, Measurement, memory_with


class StepEnds(TrainerCallback):  # type: ignore[misc]
    """Notes the end of every optimizer step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def peer_row(row: dict[str, Any]) -> dict[str, list[int]]:
    """A TOKENIZED row as TRL's tokenize_row would leave it: a label of -100 on each token of the prompt."""
    prompt_len = row["prompt_len"]
    columns = {
        "prompt_input_ids": row["chosen_input_ids"][:prompt_len],
        "prompt_attention_mask": [1] * prompt_len,
    }
    for side in ("chosen", "rejected"):
        ids = row[f"{side}_input_ids"]
        columns[f"{side}_input_ids"] = ids
        columns[f"{side}_attention_mask"] = [1] * len(ids)
        columns[f"{side}_labels"] = [-100] * prompt_len + ids[prompt_len:]
    return columns


def settings(job: Job, output: str) -> ORPOConfig:
    return ORPOConfig(
        output_dir=output,
        max_steps=job.warmup + job.steps,
        per_device_train_batch_size=job.peer_micro_batch,
        gradient_accumulation_steps=job.batch_size // job.peer_micro_batch,
        train_sampling_strategy="sequential",
        max_length=job.max_length,
        beta=job.weight_of_odds,
        disable_dropout=True,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        bf16=job.dtype == "bf16",
        gradient_checkpointing=job.peer_checkpointing,
        use_cpu=job.device == "cpu",
        seed=job.seed,
        logging_steps=1,  # as ours
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def measure(job: Job) -> None:
    rows = Dataset.from_list([peer_row(row) for batch in job.batches() for row in batch.to_pylist()])
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).to(job.device)
    loaded = memory_with(model, job.device)
    words = AutoTokenizer.from_pretrained(job.model)
    ends = StepEnds()
    with tempfile.TemporaryDirectory() as output:
        trainer = ORPOTrainer(model, settings(job, output), None, text, processing_class=words, callbacks=[ends])
        trainer.train_dataset = rows
        trainer.train()
    # the logged `loss` is rounded, its terms are not
    logs = [line for line in trainer.state.log_history if "nll_loss" in line]
    losses = [line["nll_loss"] - job.weight_of_odds * line["log_odds_ratio"] for line in logs]
    Measurement.finish(job, ends.times, trainer.optimizer, losses=losses, loaded=loaded)


if __name__ == "__main__":
    measure(Job.from_argument())
