"""Time from the start of `orpo train` to the start and the end of its first optimizer step, by size of the dataset."""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from benchmarks.child import ORPO
from benchmarks.data import DEFAULT_DATA, tokenized_pairs
from benchmarks.table import WORK, markdown, with_median
from orpo_data.errors import OrpoError
from orpo_data.manifest import digest, read_manifest
from orpo_data.schema import TOKENIZED
from orpo_data.shards import DatasetWriter, read_table
from orpo_data.verification import content_hash


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="local model folder (default: SmolLM2-135M-Instruct, converted once)")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder with hh_rlhf/")
    add("--work", type=Path, default=WORK, help="where prepared pairs are kept")
    add("--pairs", nargs="+", type=int, default=[6_000, 60_000], help="sizes; 600000 takes 1.5 GB of --work")
    add("--batch-size", type=int, default=8)
    add("--dtype", choices=["fp32", "bf16"], default="bf16")
    add("--rounds", type=int, default=3)
    return parser.parse_args()


def repeated(folder: Path, pairs: int, output: Path) -> Path:
    """A TOKENIZED folder of `pairs` rows: those of `folder` over and over, each with an id of its own."""
    manifest = read_manifest(folder)
    key = manifest.key | {"repeated": pairs}
    if output.is_dir() and read_manifest(output).key == key:
        return output
    rows = read_table(folder, "train")
    with DatasetWriter(output, TOKENIZED) as writer:
        for start in range(0, pairs, len(rows)):
            part = rows.slice(0, min(len(rows), pairs - start))
            ids = pa.array([f"{start + row:032x}" for row in range(len(part))])
            writer.write(part.set_column(part.schema.get_field_index("id"), "id", ids), "train")
        writer.write(read_table(folder, "eval"), "eval")
        shards, dropped = writer.close()
        changed = {"key": key, "fingerprint": digest(key), "content_hash": content_hash(shards, dropped)}
        writer.commit(manifest.model_copy(update={"shards": shards, "dropped": dropped, **changed}))
    return output


def seconds_to_first_step(dataset: Path, model: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Start `orpo train`; seconds until its first step begins (its empty metrics.jsonl is there) and has ended."""
    with tempfile.TemporaryDirectory() as output, tempfile.TemporaryFile("w+") as errors:
        command = [*ORPO, "train", "--dataset", str(dataset), "--model", str(model), "-o", f"{output}/run"]
        settings = {"max_steps": 1, "batch_size": options.batch_size, "precision": options.dtype}
        command += [part for name, value in settings.items() for part in ("--set", f"train.{name}={value}")]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, cwd=Path(__file__).parents[1])
        try:
            moments: list[float] = []
            while len(moments) < 2:
                sizes = [file.stat().st_size for file in Path(output).rglob("metrics.jsonl")]
                if len(sizes) > len(moments) or any(sizes):
                    moments.append(time.perf_counter() - start)
                elif process.poll() is not None:
                    errors.seek(0)
                    raise OrpoError(f"orpo train ended before its first step: {errors.read()[-2000:]}")
                time.sleep(0.01)
            return moments[0], moments[1]
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    options = arguments()
    from pipelines.base_model import smollm2

    model = options.model or smollm2()
    real = tokenized_pairs("hh-rlhf", options.data, model, 1024, options.work)
    rows = []
    for pairs in options.pairs:
        dataset = repeated(real, pairs, options.work / f"repeated-{pairs}")
        moments = [seconds_to_first_step(dataset, model, options) for _ in range(options.rounds)]
        begun, ended = zip(*moments, strict=True)
        rows.append({"pairs": f"{pairs:,}", "begins": with_median(begun), "has ended": with_median(ended)})
    print(
        f"HH-RLHF pairs repeated; {options.dtype}, batches of {options.batch_size}, {options.rounds} runs; "
        f"seconds until the first optimizer step\n\n{markdown(rows)}"
    )


if __name__ == "__main__":
    try:
        main()
    except OrpoError as error:
        raise SystemExit(f"benchmarks.first_step: {error}") from None
