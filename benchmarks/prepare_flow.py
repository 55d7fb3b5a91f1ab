"""What Prefect costs: `orpo run` of a recipe without training beside `orpo prepare` of the same.

On a hundred pairs the difference is the flow's start; what it grows by with the pairs is the cost of the tasks.
"""

import argparse
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from statistics import median

from benchmarks.child import orpo, use_cores
from benchmarks.data import DEFAULT_DATA
from benchmarks.raw import raw_folder, write_recipe
from benchmarks.table import WORK, markdown, processor, with_median
from orpo_data.errors import OrpoError

FEW = 100  # pairs
SETTINGS = {
    "PREFECT_API_URL": "",  # a server of its own for each flow
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}


def arguments(module: str, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    add = parser.add_argument
    add("--data", type=Path, default=DEFAULT_DATA, help="folder with hh_rlhf/")
    add("--tokenizer", type=Path, help="local folder (default: SmolLM2-135M-Instruct, converted once)")
    add("--work", type=Path, default=WORK, help="where raw rows, outputs and Prefect's database lie")
    add("--pairs", type=int, default=50_000)
    add("--files", type=int, default=100)
    add("--max-length", type=int, default=1024)
    add("--rounds", type=int, default=3)
    add("--cores", type=int, default=2)
    return parser.parse_args()


class Flow:
    """A recipe, and a Prefect of its own."""

    def __init__(self, pairs: int, tokenizer: Path, options: argparse.Namespace) -> None:
        self.folder = options.work / f"flow-{pairs}"
        self.home = options.work / "prefect"
        self.environment = SETTINGS | {"PREFECT_HOME": str(self.home)}
        self.folder.mkdir(parents=True, exist_ok=True)
        raw = raw_folder("hh-rlhf", options.data, pairs, options.work, files=min(pairs, options.files))
        self.recipe = write_recipe(self.folder / "recipe.yaml", "hh-rlhf", raw, tokenizer, options.max_length)

    def seconds(self, command: str, *options: str, before: str = "") -> float:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        arguments = [command, str(self.recipe), "-o", str(self.folder / "out"), *options]
        return orpo(*arguments, environment=self.environment, before=before).seconds

    def tasks(self) -> int:
        """Task runs that Prefect's database has a line of log from; it keeps no other trace of a short flow's."""
        with closing(sqlite3.connect(self.home / "prefect.db")) as database:
            return int(database.execute("select count(distinct task_run_id) from log").fetchone()[0])

    def rounds(self, count: int) -> tuple[list[float], list[float], int]:
        """Seconds of the bare stages and of the flow, in alternating order, and the tasks of one flow."""
        times: dict[str, list[float]] = {"prepare": [], "run": []}
        before = self.tasks()
        for index in range(count):
            for command in sorted(times, reverse=index % 2 == 1):
                times[command].append(self.seconds(command))
        return times["prepare"], times["run"], (self.tasks() - before) // count


def main() -> None:
    options = arguments("prepare_flow", __doc__)
    use_cores(options.cores)
    from pipelines.base_model import smollm2

    tokenizer = options.tokenizer or smollm2()
    few = Flow(FEW, tokenizer, options)
    few.seconds("run")  # makes the database
    rows, start, fewest = [], 0.0, 0
    for pairs, flow in ((FEW, few), (options.pairs, Flow(options.pairs, tokenizer, options))):
        bare, whole, tasks = flow.rounds(options.rounds)
        over = [with_prefect - without for without, with_prefect in zip(bare, whole, strict=True)]
        row = {"pairs": f"{pairs:,}", "stages, s": with_median(bare), "flow, s": with_median(whole)}
        row |= {"over the stages, s": with_median(over), "tasks": str(tasks), "cost of the tasks": ""}
        if pairs == FEW:
            start, fewest = median(over), tasks
        else:
            cost = median(over) - start
            each = f", {cost / (tasks - fewest):.3f} s each further task" if tasks > fewest else ""
            row["cost of the tasks"] = f"{cost / median(bare):.1%}{each}"
        rows.append(row)
    print(
        f"{processor()}, {options.cores} cores. `orpo prepare` and `orpo run` of HH-RLHF pairs in at most "
        f"{options.files} files, each from its start to its end, in turns; {options.rounds} rounds.\n\n{markdown(rows)}"
    )


if __name__ == "__main__":
    try:
        main()
    except OrpoError as error:
        raise SystemExit(f"benchmarks.prepare_flow: {error}") from None
