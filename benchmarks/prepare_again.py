"""Seconds of `orpo prepare` where its output is there already: nothing changed, or one raw file of a hundred did.

Each is a process of its own, its start and imports included; a full run beside it says what the result must be.
"""

import argparse
import shutil
from pathlib import Path

from benchmarks.child import orpo, use_cores
from benchmarks.data import DEFAULT_DATA
from benchmarks.raw import STEPS, numbered, raw_folder, real_rows, repeated, write_recipe, write_rows
from benchmarks.table import WORK, markdown, processor, with_median
from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, read_manifest

UNUSED = 100_000_000  # number of a row that no raw file has


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare_again", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=DEFAULT_DATA, help="folder with hh_rlhf/")
    add("--tokenizer", type=Path, help="local folder (default: SmolLM2-135M-Instruct, converted once)")
    add("--work", type=Path, default=WORK, help="where raw rows and outputs lie")
    add("--pairs", type=int, default=50_000)
    add("--files", type=int, default=100)
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="all: normalise, flags, dedup, label noise too")
    add("--max-length", type=int, default=1024)
    add("--rounds", type=int, default=3)
    add("--cores", type=int, default=2)
    return parser.parse_args()


class Project:
    """Raw files, a recipe and its output, in a folder that is made anew."""

    def __init__(self, steps: str, tokenizer: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.work / f"again-{steps}"
        shutil.rmtree(self.folder, ignore_errors=True)
        raw = raw_folder("hh-rlhf", options.data, options.pairs, options.work, files=options.files, words=True)
        self.raw = shutil.copytree(raw, self.folder / "raw")
        self.recipe = write_recipe(
            self.folder / "recipe.yaml", "hh-rlhf", self.raw, tokenizer, options.max_length, steps
        )

    def prepare(self, output: str = "out") -> float:
        """Seconds of `orpo prepare`."""
        return orpo("prepare", str(self.recipe), "-o", str(self.folder / output)).seconds

    def write(self, name: str) -> None:
        """Add a raw file, or replace the one of this name, by rows that are in no other."""
        rows = repeated(real_rows("hh-rlhf", self.options.data), UNUSED, numbered)
        write_rows(self.raw / name, rows, self.options.pairs // self.options.files)

    def contents(self, output: str) -> dict[str, str]:
        """The content hash of every dataset below an output folder."""
        folders = [file.parent for file in sorted((self.folder / output).rglob(MANIFEST_NAME))]
        return {folder.name: read_manifest(folder).content_hash for folder in folders}


def table_rows(steps: str, project: Project, rounds: int) -> list[dict[str, str]]:
    last = f"part-{project.options.files - 1:05d}.jsonl.gz"
    full = project.prepare()
    same = [project.prepare() for _ in range(rounds)]
    rows = [
        {"steps": steps, "what": "nothing", "seconds": with_median(same), "of a full run": f"{max(same) / full:.1%}"}
    ]
    rows[0]["content"] = "not written"
    for what, name in (("a file changed", last), ("a file added", "part-99999.jsonl.gz")):
        project.write(name)
        seconds = project.prepare()
        shutil.rmtree(project.folder / "full", ignore_errors=True)
        full = project.prepare("full")
        equal = project.contents("out") == project.contents("full")
        share = {"seconds": f"{seconds:.2f}", "of a full run": f"{seconds / full:.1%} of {full:.1f} s"}
        rows.append({"steps": steps, "what": what, **share, "content": "the same" if equal else "DIFFERS"})
    return rows


def main() -> None:
    options = arguments()
    use_cores(options.cores)
    from pipelines.base_model import smollm2

    tokenizer = options.tokenizer or smollm2()
    rows = [
        row for steps in options.steps for row in table_rows(steps, Project(steps, tokenizer, options), options.rounds)
    ]
    print(
        f"{processor()}, {options.cores} cores. `orpo prepare` of {options.pairs:,} HH-RLHF pairs in {options.files} "
        f"raw files, from its start to its end; content: beside that of a full run.\n\n{markdown(rows)}"
    )


if __name__ == "__main__":
    try:
        main()
    except OrpoError as error:
        raise SystemExit(f"benchmarks.prepare_again: {error}") from None
