"""Memory and time of `orpo prepare` by the number of pairs, with every step on that looks at the whole dataset.

The real HH-RLHF rows are repeated with words exchanged, so that the share of near-duplicates stays what it is in them.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.child import Finished, ask, orpo, use_cores
from benchmarks.data import DEFAULT_DATA
from benchmarks.raw import STEPS, raw_folder, write_recipe
from benchmarks.table import MIB, WORK, markdown, processor
from orpo_data.errors import OrpoError


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare_scale", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=DEFAULT_DATA, help="folder with hh_rlhf/")
    add("--tokenizer", type=Path, help="local folder (default: SmolLM2-135M-Instruct, converted once)")
    add("--work", type=Path, default=WORK, help="where raw rows and outputs lie; a million pairs take 20 GB")
    add("--pairs", nargs="+", type=int, default=[20_000, 50_000, 200_000, 1_000_000])
    add("--steps", choices=STEPS, default="all", help="all: normalise, flags, dedup with near, label noise too")
    add("--linear-from", type=int, default=50_000, help="size whose time per pair the others are compared with")
    add("--max-length", type=int, default=1024)
    add("--cores", type=int, default=2)
    return parser.parse_args()


def prepare(pairs: int, tokenizer: Path, options: argparse.Namespace) -> tuple[Finished, Finished]:
    """As a command, whose memory is watched, and again as `prepare_ours`, for how busy tokenize keeps the cores."""
    raw = raw_folder("hh-rlhf", options.data, pairs, options.work, files=max(1, pairs // 10_000), words=True)
    folder = options.work / f"scale-{pairs}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = write_recipe(folder / "recipe.yaml", "hh-rlhf", raw, tokenizer, options.max_length, options.steps)
    command = orpo("prepare", str(recipe), "-o", str(folder / "out"), "--json", watch_memory=True)
    shutil.rmtree(folder / "out")
    places = {"recipe": str(recipe), "tokenizer": str(tokenizer), "output": str(folder / "out")}
    stages = ask("benchmarks.prepare_ours", places)
    shutil.rmtree(folder / "out")
    return command, stages


def table_rows(found: dict[int, tuple[Finished, Finished]], linear_from: int) -> list[dict[str, str]]:
    least, _ = found[min(found)]
    base, _ = found.get(linear_from, found[min(found)])
    base_pairs = linear_from if linear_from in found else min(found)
    rows = []
    for pairs, (one, stages) in found.items():
        tokenize = stages.answer["stages"]["tokenize"]
        reports: list[dict[str, Any]] = json.loads(one.output)
        rows.append(
            {
                "pairs": f"{pairs:,}",
                "kept": f"{reports[-1]['rows_out']:,}",
                "seconds": f"{one.seconds:.1f}",
                "microseconds a pair": f"{one.seconds / pairs * 1e6:.0f}",
                "of linear": f"{one.seconds / pairs / (base.seconds / base_pairs):.2f}",
                "CPU microseconds a pair": f"{one.cpu_seconds / pairs * 1e6:.0f}",
                "peak MiB": f"{one.peak / MIB:.0f}",
                "without mapped files": f"{one.peak_private / MIB:.0f}",
                "of the least": f"{one.peak / least.peak:.2f}",
                "tokenize: CPU time / wall time": f"{tokenize['cpu_seconds'] / tokenize['seconds']:.2f}",
                "user time alone": f"{tokenize['user_seconds'] / tokenize['seconds']:.2f}",
                "seconds of stages": ", ".join(f"{report['stage']} {report['seconds']:.1f}" for report in reports),
            }
        )
    return rows


def main() -> None:
    options = arguments()
    use_cores(options.cores)
    from pipelines.base_model import smollm2

    tokenizer = options.tokenizer or smollm2()
    found = {pairs: prepare(pairs, tokenizer, options) for pairs in sorted(options.pairs)}
    print(
        f"{processor()}, {options.cores} cores. `orpo prepare` from its start to its end, steps: {options.steps}; "
        "memory is resident, of all its processes together. CPU time by wall time of tokenize: without its imports, "
        "with its tokenizer open.\n\n"
        f"{markdown(table_rows(found, options.linear_from))}"
    )


if __name__ == "__main__":
    try:
        main()
    except OrpoError as error:
        raise SystemExit(f"benchmarks.prepare_scale: {error}") from None
