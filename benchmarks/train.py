"""Pairs per second, memory and loss of this project's training beside a peer's.

Both sides get the same token ids, pairs, global batches and order, and take turns, each in a fresh process.
"""

import argparse
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from statistics import median

from benchmarks.data import DEFAULT_DATA, SOURCES, pair_lengths, tokenized_pairs
from benchmarks.flops import CONFIGS, needed_flops, random_model
from benchmarks.measure import Job, Measurement, run_side
from benchmarks.table import MIB, WORK, markdown, processor, with_median
from orpo_data.errors import OrpoError

OURS = "benchmarks.ours"
PEERS = {"trl": "benchmarks.peer_trl"}
Rounds = list[tuple[Measurement, Measurement]]
"""(ours, peer) of each round."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    add = parser.add_argument
    add("--peer", choices=PEERS, default="trl")
    add("--model", type=Path, help="local model folder (default: SmolLM2-135M-Instruct, converted once)")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder with hh_rlhf/ and ultrafeedback_binarized/")
    add("--work", type=Path, default=WORK, help="where prepared pairs are kept")
    add("--dataset", nargs="+", choices=SOURCES, default=list(SOURCES))
    add("--pairs", choices=["all", "middle"], default="all", help="middle: the middle half by length")
    add("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    add("--batch-size", type=int, default=8, help="pairs per optimizer step")
    add("--max-length", type=int, default=1024, help="most tokens of a prompt and its answer")
    add("--steps", type=int, default=4, help="timed steps in each round")
    add("--warmup", type=int, default=1, help="steps before them")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--micro-batch-tokens", type=int, help="ours: most tokens per forward pass")
    add("--peer-micro-batch", type=int, help="the peer: pairs per forward pass (default: --batch-size)")
    add("--peer-checkpointing", action="store_true", help="the peer recomputes activations")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--config", choices=CONFIGS, help="random weights of this shape in place of the model's")
    add("--peak-tflops", type=float, help="the device's, in --dtype: shows model FLOP utilisation")
    options = parser.parse_args()
    options.peer_micro_batch = options.peer_micro_batch or options.batch_size
    if options.batch_size % options.peer_micro_batch or options.warmup < 1:
        parser.error("--peer-micro-batch must divide --batch-size, and --warmup be at least 1")
    return options


def make_job(options: argparse.Namespace, model: Path, dataset: Path, dtype: str) -> Job:
    given = vars(options) | {"model": str(model), "dataset": str(dataset), "dtype": dtype}
    return Job(**{field.name: given[field.name] for field in fields(Job) if field.name in given})


def alternate(job: Job, peer: str, rounds: int) -> Rounds:
    """Run both sides in each round; who goes first changes from round to round."""
    measured = []
    for index in range(rounds):
        order = [OURS, peer] if index % 2 == 0 else [peer, OURS]
        found = {module: run_side(module, job) for module in order}
        measured.append((found[OURS], found[peer]))
    return measured


def table_row(name: str, job: Job, rounds: Rounds, tflops: float | None) -> dict[str, str]:
    """One line of the table: ours / peer, medians of the rounds, and the ratio of each round."""
    lengths = [pair for batch in job.batches()[job.warmup :] for pair in pair_lengths(batch)]
    tokens = sum(pair.needed + pair.prompt for pair in lengths)  # of both sequences, without padding

    def both(figure: Callable[[Measurement], float], form: str) -> str:
        ours, peer = (median(figure(side) for side in sides) for sides in zip(*rounds, strict=True))
        return f"{ours:{form}} / {peer:{form}}"

    parts = [[getattr(pair, part) for pair in lengths] for part in ("prompt", "chosen", "rejected")]
    ours_loss, peer_loss = (side.losses[0] for side in rounds[0])
    row = {
        "pairs": f"{name} ({', '.join(f'{median(part):.0f}' for part in parts)})",
        "dtype": job.dtype,
        "pairs/s": both(lambda side: len(lengths) / side.seconds, ".3f"),
        "times faster": with_median([peer.seconds / ours.seconds for ours, peer in rounds]),
        "tokens/s": both(lambda side: tokens / side.seconds, ".0f"),
        "peak MiB": both(lambda side: side.peak / MIB, ".0f"),
        "MiB above": both(lambda side: side.above / MIB, ".0f"),
        "share of its MiB above": with_median([ours.above / peer.above for ours, peer in rounds]),
        "data": f"{median(ours.data_seconds / ours.seconds for ours, _ in rounds):.2%}",
        "first loss": f"{ours_loss:.6f} / {peer_loss:.6f} ({ours_loss - peer_loss:+.1e})",
    }
    if tflops:
        flops = needed_flops(Path(job.model), lengths)
        row["FLOP utilisation"] = both(lambda side: flops / side.seconds / tflops / 1e12, ".1%")
    return row


def hardware(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return processor()


def conditions(options: argparse.Namespace) -> str:
    """What the table's figures mean and were measured with."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", options.peer))
    return f"""\
{hardware(options.device)}, {options.threads} threads; {versions}. Batches of {options.batch_size} of {options.pairs} \
pairs, max length {options.max_length}; {options.rounds} rounds of {options.steps} timed steps after \
{options.warmup}. {options.peer}: {options.peer_micro_batch} pairs per forward pass, \
{"with" if options.peer_checkpointing else "no"} gradient checkpointing. Figures are ours / {options.peer}, medians of \
the rounds, in brackets each round; behind the pairs' name the median tokens of prompt, chosen and rejected. MiB above \
(weights and optimizer) is the peak - what was in use after imports and with the model loaded - AdamW's state; \
gradients are in it. data: making batches, as a share of our step. first loss: of the same batch, before any update."""


def main() -> None:
    options = arguments()
    from pipelines.base_model import smollm2

    tokenizer = options.model or smollm2()
    model = random_model(options.config, tokenizer, options.work) if options.config else tokenizer
    rows = []
    for name in options.dataset:
        dataset = tokenized_pairs(name, options.data, tokenizer, options.max_length, options.work)
        for dtype in options.dtype:
            job = make_job(options, model, dataset, dtype)
            rows.append(table_row(name, job, alternate(job, PEERS[options.peer], options.rounds), options.peak_tflops))
    print(f"{conditions(options)}\n\n{markdown(rows)}")


if __name__ == "__main__":
    try:
        main()
    except OrpoError as error:
        raise SystemExit(f"benchmarks.train: {error}") from None
