"""Raw preference pairs to token ids: this project beside TRL's preprocessing and beside the bare tokenizer.

All get the same raw rows, chat template, tokenizer and limit, and take turns, each in a fresh process: ours goes from
gzipped JSON lines to verified shards on disk; TRL from messages in memory-mapped Arrow (`ORPOTrainer`'s three `map`
calls, in the faster of one and two processes); the floor from rendered texts in memory to ids that nobody keeps.
"""

import argparse
import math
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.child import Finished, ask, orpo, use_cores
from benchmarks.data import DEFAULT_DATA, SOURCES
from benchmarks.raw import raw_folder, write_recipe
from benchmarks.table import WORK, markdown, processor, with_median
from orpo_data.errors import OrpoError

PEERS = {"trl": "benchmarks.prepare_trl"}


@dataclass(frozen=True)
class Round:
    ours: Finished
    command: Finished
    peer: Finished
    floor: Finished

    def speed(self, side: str, clock: str = "seconds") -> float:
        """Pairs a second. Of the raw rows the peer and the floor get those that can be read as conversations."""
        answer = getattr(self, side).answer
        return float(answer["pairs"] / answer[clock])

    def over(self, side: str, clock: str = "seconds") -> float:
        """How many times the pairs a second ours has."""
        return self.speed("ours", clock) / self.speed(side, clock)

    def command_over(self, side: str) -> float:
        """The same of `orpo prepare`, with the start of its interpreter, its imports and its end."""
        return float(self.ours.answer["pairs"] / self.command.seconds / self.speed(side))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=__doc__)
    add = parser.add_argument
    add("--peer", choices=PEERS, default="trl")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder with hh_rlhf/ and ultrafeedback_binarized/")
    add("--tokenizer", type=Path, help="local folder (default: SmolLM2-135M-Instruct, converted once)")
    add("--work", type=Path, default=WORK, help="where raw rows and outputs are kept")
    add("--dataset", nargs="+", choices=SOURCES, default=list(SOURCES))
    add("--pairs", type=int, default=50_000, help="the real rows are repeated to so many, each with a number")
    add("--files", type=int, default=1, help="raw files that they come in")
    add("--max-length", type=int, default=1024, help="most tokens of a prompt and its answer")
    add("--rounds", type=int, default=3)
    add("--cores", type=int, default=2)
    add("--check", type=int, default=500, help="rows whose ids are compared with transformers' own")
    return parser.parse_args()


class Contest:
    """The sides on one data set."""

    def __init__(self, dataset: str, tokenizer: Path, options: argparse.Namespace) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.folder = options.work / f"prepare-{dataset}-{options.pairs}"
        self.output = self.folder / "ours"
        self.module = PEERS[options.peer]
        raw = raw_folder(dataset, options.data, options.pairs, options.work, files=options.files)
        self.folder.mkdir(exist_ok=True)
        self.recipe = write_recipe(self.folder / "recipe.yaml", dataset, raw, tokenizer, options.max_length)

    def ours(self) -> Finished:
        shutil.rmtree(self.output, ignore_errors=True)
        folders = {"recipe": self.recipe, "tokenizer": self.tokenizer, "output": self.output}
        return ask("benchmarks.prepare_ours", {name: str(folder) for name, folder in folders.items()})

    def command(self) -> Finished:
        output = self.folder / "command"
        shutil.rmtree(output, ignore_errors=True)
        return orpo("prepare", str(self.recipe), "-o", str(output))

    def peer(self, processes: int) -> Finished:
        limit = {"max_length": self.options.max_length}
        return ask(self.module, self._texts() | limit | {"processes": processes})

    def floor(self) -> Finished:
        return ask("benchmarks.prepare_floor", self._texts() | {"processes": self.options.cores})

    def _texts(self) -> dict[str, str]:
        return {"pairs": str(self.output / "binarize"), "tokenizer": str(self.tokenizer)}

    def rounds(self) -> tuple[list[Round], int]:
        """Each round in another order, and how many processes suit the peer; the first is the one that finds out."""
        first, tries = self.ours(), {processes: self.peer(processes) for processes in {1, self.options.cores}}
        best = min(tries, key=lambda processes: tries[processes].answer["seconds"])
        found = [Round(ours=first, command=self.command(), peer=tries[best], floor=self.floor())]
        for index in range(1, self.options.rounds):
            sides = {"floor": self.floor, "peer": lambda: self.peer(best), "ours": self.ours, "command": self.command}
            names = list(sides) if index % 2 else list(reversed(sides))
            found.append(Round(**{name: sides[name]() for name in names}))
        if len({one.ours.answer["content_hash"] for one in found}) > 1:
            raise OrpoError(f"{self.output}: the rounds differ in their content")
        return found, best


def check_ids(output: Path, tokenizer: Path, count: int) -> str:
    """Compare rows of the whole dataset with `apply_chat_template(tokenize=True)`; OrpoError names one that differs."""
    import polars as pl
    from transformers import AutoTokenizer

    import orpo_data

    words: Any = AutoTokenizer.from_pretrained(tokenizer)
    ids = orpo_data.scan(output / "tokenize").filter(pl.col("prompt_turns_dropped") == 0).collect()
    ids = ids.gather_every(math.ceil(len(ids) / count))
    messages = orpo_data.scan(output / "split").filter(pl.col("id").is_in(ids["id"].implode()))
    texts = {row["id"]: row for row in messages.select("id", "prompt", "chosen", "rejected").collect().to_dicts()}
    for row in ids.to_dicts():
        text = texts[row["id"]]
        prompt = words.apply_chat_template(text["prompt"], add_generation_prompt=True, return_dict=False)
        for side in ("chosen", "rejected"):
            whole, found = (
                words.apply_chat_template(text["prompt"] + text[side], return_dict=False),
                row[f"{side}_input_ids"],
            )
            end = words.decode(whole[len(found) :])  # the template's line break, unless the answer was cut
            sound = row[f"{side}_truncated"] or end in ("", "\n")
            if not (sound and whole[: len(found)] == found and found[: row["prompt_len"]] == prompt):
                raise OrpoError(f"row {row['id']}, {side}: other ids than transformers'")
    return f"both sides of {len(ids)} rows have transformers' ids"


def table_row(dataset: str, rounds: list[Round], processes: int) -> dict[str, str]:
    tokens = rounds[0].floor.answer["tokens"] / rounds[0].floor.answer["pairs"]
    row = {"pairs": f"{dataset}, {rounds[0].ours.answer['pairs']:,} ({tokens:.0f} tokens)"}
    for side in ("ours", "peer", "floor"):
        speed = median(one.speed(side) for one in rounds)
        row[f"{side}: pairs/s, M tokens/s"] = f"{speed:,.0f}, {speed * tokens / 1e6:.2f}"
    return row | {
        "times the peer": with_median([one.over("peer") for one in rounds]),
        "by CPU time": with_median([one.over("peer", "cpu_seconds") for one in rounds]),
        "as `orpo prepare`": with_median([one.command_over("peer") for one in rounds]),
        "of the floor": with_median([one.over("floor") for one in rounds]),
        "of it by CPU time": with_median([one.over("floor", "cpu_seconds") for one in rounds]),
        "peer's processes": str(processes),
    }


def stage_rows(dataset: str, rounds: list[Round]) -> list[dict[str, str]]:
    """Seconds of each stage of ours, and how busy it kept the cores."""
    rows = []
    answers = [one.ours.answer for one in rounds]
    pairs = answers[0]["pairs"]
    for stage in answers[0]["stages"]:
        times = [answer["stages"][stage] for answer in answers]
        rows.append(
            {
                "pairs": dataset,
                "stage": stage,
                "seconds": with_median([time["seconds"] for time in times]),
                "share": f"{median(answer['stages'][stage]['seconds'] / answer['seconds'] for answer in answers):.0%}",
                "CPU microseconds a pair": f"{median(time['cpu_seconds'] for time in times) / pairs * 1e6:.1f}",
                "CPU time / wall time": with_median([time["cpu_seconds"] / time["seconds"] for time in times]),
                "user time alone": with_median([time["user_seconds"] / time["seconds"] for time in times]),
            }
        )
    return rows


def conditions(options: argparse.Namespace, checks: list[str]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "datasets", options.peer))
    return f"""\
{processor()}, {options.cores} cores; {versions}. {options.rounds} rounds, medians, in brackets each round; max length \
{options.max_length}, {options.files} raw files. Tokens of prompt, chosen and rejected, each once, for all sides. By \
CPU time: pairs per second of CPU time, of all cores together. As `orpo prepare`: with the start and the imports of a \
command and the opening of the tokenizer, which the other figures of ours leave out as they do the peer's. \
{"; ".join(checks)}."""


def main() -> None:
    options = arguments()
    use_cores(options.cores)
    from pipelines.base_model import smollm2

    tokenizer = options.tokenizer or smollm2()
    rows, stages, checks = [], list[dict[str, str]](), []
    for dataset in options.dataset:
        contest = Contest(dataset, tokenizer, options)
        rounds, processes = contest.rounds()
        rows.append(table_row(dataset, rounds, processes))
        stages += stage_rows(dataset, rounds)
        checks.append(f"{dataset}: {check_ids(contest.output, tokenizer, options.check)}")
    print(f"{conditions(options, checks)}\n\n{markdown(rows)}\n\n{markdown(stages)}")


if __name__ == "__main__":
    try:
        main()
    except OrpoError as error:
        raise SystemExit(f"benchmarks.prepare: {error}") from None
