"""Whether another engine gives the ids of `tokenizers`, and how fast it is: one that ever differs is of no use here.

Texts are drawn from pieces that encoders are known to split in different ways, by a seeded generator. gigatoken
is given a vocabulary in which every byte has a token, with ids of their own where it lacked one: it refuses others.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from benchmarks.data import DEFAULT_DATA
from benchmarks.raw import real_rows
from benchmarks.table import markdown, processor
from orpo_data.errors import OrpoError

Encode = Callable[[list[str]], list[list[int]]]

PIECES = (
    *("a", "The", " the", "é", "ß", "Привет", "你好", "한국", "🙂", "e\u0301", "\u0378", "\U000e0fff", "\ufffd"),
    *(
        "'s",
        "'S",
        "'ll",
        " 're",
        "\u2019s",
        "don't",
        "1",
        "1234",
        "٣",
        "½",
        "²",
        "_",
        "-",
        "...",
        "?!",
        "<|im_end|>",
        "<|",
    ),
    *(" ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u0085", "\x00", "\x04"),
)
BATCH = 1_000  # texts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    add = parser.add_argument
    add("engines", nargs="+", choices=ENGINES, help="installed beside this project")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder with hh_rlhf/")
    add("--tokenizer", type=Path, help="local folder (default: SmolLM2-135M-Instruct, converted once)")
    add("--texts", type=int, default=100_000, help="drawn ones")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def tokie(file: Path) -> Encode:
    made = import_module("tokie").Tokenizer.from_json(str(file))
    return lambda texts: [list(found.ids) for found in made.encode_batch(texts, add_special_tokens=False)]


def gigatoken(file: Path) -> Encode:
    made = import_module("gigatoken").Tokenizer(with_all_bytes(Tokenizer.from_file(str(file))))
    return lambda texts: [list(map(int, found)) for found in made.encode_batch_list(texts)]


ENGINES: dict[str, Callable[[Path], Encode]] = {"tokie": tokie, "gigatoken": gigatoken}


def with_all_bytes(tokenizer: Tokenizer) -> Tokenizer:
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    known = document["model"]["vocab"]
    first = 1 + max([*known.values(), *(token["id"] for token in document["added_tokens"])])
    lacking = [char for char in sorted(pre_tokenizers.ByteLevel.alphabet()) if char not in known]
    known |= {char: first + place for place, char in enumerate(lacking)}
    return Tokenizer.from_str(json.dumps(document))


def hostile_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(count)]


def transcripts(data: Path) -> list[str]:
    return [row["chosen"] for row in real_rows("hh-rlhf", data)]


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    return (list(texts[first : first + BATCH]) for first in range(0, len(texts), BATCH))


def encoded(encode: Encode, texts: Sequence[str]) -> tuple[list[list[int]], float]:
    """Ids, and seconds."""
    started, found = time.perf_counter(), []
    for batch in batches(texts):
        found += encode(batch)
    return found, time.perf_counter() - started


def examples(texts: Sequence[str]) -> list[str]:
    """The shortest text, then again and again the shortest that has no character of those before."""
    found: list[str] = []
    for text in sorted(texts, key=len):
        if not set(text) & set("".join(found)):
            found.append(text)
    return found


def main() -> None:
    options = arguments()
    from pipelines.base_model import smollm2

    file = (options.tokenizer or smollm2()) / "tokenizer.json"
    bare = Tokenizer.from_file(str(file))

    def floor(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in bare.encode_batch_fast(texts, add_special_tokens=False)]

    hostile, real = hostile_texts(options.texts, options.seed), transcripts(options.data)
    rows = []
    for name in options.engines:
        try:
            encode = ENGINES[name](file)
        except RuntimeError as error:
            print(f"{name} {version(name)} refuses this tokenizer: {str(error).splitlines()[0]}\n")
            continue
        (expected, _), (found, _) = encoded(floor, hostile), encoded(encode, hostile)
        differ = [text for text, a, b in zip(hostile, expected, found, strict=True) if a != b]
        (expected, seconds), (found, own_seconds) = encoded(floor, real), encoded(encode, real)
        rows.append(
            {
                "engine": f"{name} {version(name)}",
                "hostile texts that differ": f"{len(differ):,} of {len(hostile):,}",
                "of real ones": f"{sum(a != b for a, b in zip(expected, found, strict=True)):,} of {len(real):,}",
                "times as fast on those": f"{seconds / own_seconds:.1f}",
                "the shortest that differ": ", ".join(f"`{text!a}`" for text in examples(differ)),
            }
        )
    if rows:
        print(f"{processor()}, tokenizers {version('tokenizers')}.\n\n{markdown(rows)}")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OrpoError) as error:
        raise SystemExit(f"benchmarks.engines: {error}") from None
