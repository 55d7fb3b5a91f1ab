"""Hostile rows: whatever a line says, every parser and every step makes a row of it or sets it aside."""

import gzip
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from orpo_data.shards import read_table
from orpo_data.sources.files import RawFile, read_records
from orpo_data.sources.json_text import CHUNK, TOO_LONG, Limits
from orpo_data.steps.parse import Parse
from pipelines import prepare
from pipelines.recipe import Recipe

TEXTS = [
    *("", " ", "\n\n", "\x00", "\ufeff", "\u202e", "\ud83d\ude00" * 50, "a" * 5_000, "\\ud800", "<|im_end|>", "</s>"),
    *("\n\nHuman: x\n\nAssistant: y", "{{ 7 * 7 }}", "{% raw %}", "<script>alert(1)</script>", "../../etc/passwd"),
    *(
        "\u0130\u0131\u017fK",
        "e\u0301" * 99,
        "\u200b\u2028\u0085",
        "%s%n",
        "=cmd|' /C calc'!A0",
        "NaN",
        "-0",
        "\x1b[2J",
    ),
]
VALUES = [None, True, False, 0, -1, 2**63, -(2**63), 2**200, 1e308, 1e-320, 0.1, [], {}, [[]], [None], {"": {}}, [{}]]
RAW = [
    "nul",
    "NaN",
    "Infinity",
    "1e999",
    '"\\ud800"',
    "[" * 900 + "]" * 900,
    '{"a":1,"a":2}',
    "//",
    "\\",
    "\udc80",
    "\x00",
]


def mutated(value: Any, draw: random.Random, depth: int = 0) -> Any:
    """The same document with something hostile in the place of one or more of its parts."""
    if draw.random() < 0.06:
        return draw.choice([*TEXTS, *VALUES])
    if isinstance(value, dict):
        items = [(name if draw.random() > 0.02 else draw.choice(TEXTS), item) for name, item in value.items()]
        return {name: mutated(item, draw, depth + 1) for name, item in items if draw.random() > 0.01}
    if isinstance(value, list):
        return [mutated(item, draw, depth + 1) for item in value for _ in range(draw.choice([0, 1, 1, 1, 1, 1, 1, 2]))]
    if isinstance(value, str) and draw.random() < 0.15:
        at = draw.randrange(len(value) + 1)
        return value[:at] + draw.choice(TEXTS) + value[at:]
    return value


def hostile_line(rows: list[Any], draw: random.Random) -> bytes:
    line = json.dumps(mutated(draw.choice(rows), draw), ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
    if draw.random() < 0.15:
        at = draw.randrange(len(line) + 1)
        kind = draw.randrange(3)
        noise = draw.choice(RAW).encode(errors="surrogateescape") if kind else draw.randbytes(3)
        line = line[:at] + noise + line[at + (kind == 1) :] if kind < 2 else line[:at]
    return line.replace(b"\n", b" ").replace(b"\r", b" ") or b" "


@pytest.fixture
def hostile_files(raw_data: Path, tmp_path: Path) -> Callable[[int], dict[str, Path]]:
    """For each source a file with so many lines, half of them gzip."""
    own = [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "score_chosen": 3, "score_rejected": 1},
        {"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "rejected": "B"},
    ]

    def write(count: int) -> dict[str, Path]:
        files = {}
        for name, raw in (("hh-rlhf", "hh/train.jsonl"), ("ultrafeedback", "uf/evol_instruct.jsonl"), ("pairs", "")):
            lines = (raw_data / raw).read_text().splitlines() if raw else map(json.dumps, own)
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            draw = random.Random(name)
            content = b"\n".join(json.dumps(row).encode() for row in rows[:1]) + b"\n"
            content += b"\n".join(hostile_line(rows, draw) for _ in range(count))
            files[name] = tmp_path / f"{name}.jsonl.gz"
            files[name].write_bytes(gzip.compress(content, 1))
        return files

    return write


@pytest.mark.parametrize("count", [60, pytest.param(100_000, marks=pytest.mark.faults)])
def test_every_parser_and_step(
    hostile_files: Callable[[int], dict[str, Path]], make_recipe: Callable[..., Recipe], tmp_path: Path, count: int
) -> None:
    """`count` lines of each source through the whole data part: every row is kept or set aside, in bounded memory."""
    files = hostile_files(count)
    sources = [{"dataset": name, "path": str(path)} for name, path in files.items()]
    steps = ["normalise={redact: [email, phone]}", "dedup={near: 0.65}", "label_noise={}", "split.eval_fraction=0.1"]
    rules = dict.fromkeys(("role_label_in_text", "repetition", "refusal", "boilerplate", "personal_data"), "flag")
    begun = time.process_time()
    prepare(make_recipe(f"sources={json.dumps(sources)}", f"clean={json.dumps(rules)}", *steps), tmp_path / "run")
    for stage in ("ingest/hh-rlhf", "ingest/ultrafeedback", "ingest/pairs", "binarize", "clean", "split", "tokenize"):
        manifest = read_manifest(tmp_path / "run" / stage)
        for step in manifest.steps:
            assert step.rows_in + step.expanded == step.rows_out + sum(step.dropped.values())
        assert len(read_table(tmp_path / "run" / stage, "dropped")) == sum(manifest.drop_reasons.values())
    assert manifest.rows > count / 100  # most are duplicates of few rows, or nothing is left of them
    assert time.process_time() - begun < 120 + count / 50
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 * 2**20  # kilobytes


# --- bombs ------------------------------------------------------------------------------------------------------------


def bomb(path: Path, megabytes: int, before: bytes = b"", after: bytes = b"") -> Path:
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(before)
        for _ in range(megabytes):
            file.write(b"a" * 2**20)
        file.write(after)
    return path


@pytest.mark.parametrize("megabytes", [80, pytest.param(20_000, marks=pytest.mark.faults)])
def test_a_line_without_end(tmp_path: Path, megabytes: int) -> None:
    """A few kilobytes that unfold to one line: it is dropped, the lines around it are read, memory stays small."""
    row = json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"}).encode() + b"\n"
    path = bomb(tmp_path / "bomb.jsonl.gz", megabytes, before=row, after=b"\n" + row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = Limits(record=2 * CHUNK)
    tables = list(read_records(RawFile("bomb.jsonl.gz", path), "pairs", limits=limits))
    records = [record for table in tables for record in table["record"].to_pylist()]
    assert [record.startswith(TOO_LONG) for record in records] == [False, True, False]
    assert [row for table in tables for row in table["source_row"].to_pylist()] == [0, 1, 2]
    out = Parse(dataset="pairs").apply(tables[0])
    assert out.dropped["detail"].to_pylist() == [f"{TOO_LONG}{2 * CHUNK:,} bytes"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 60 * 1024


def test_a_json_array_without_end(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.json.gz", 8, before=b'["', after=b'"]')
    source = json.dumps([{"dataset": "pairs", "path": str(path), "max_array_bytes": 2 * CHUNK}])
    with pytest.raises(OrpoError, match=r"more than 2,097,152 bytes in one JSON array.*max_array_bytes"):
        prepare(make_recipe(f"sources={source}"), tmp_path / "run")


# --- by coverage ------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_parsers_by_coverage(tmp_path: Path) -> None:
    """atheris (libFuzzer) steers its inputs into new branches of the readers and parsers: 100,000 of them."""
    pytest.importorskip("atheris")
    for target in ("lines", "array", "hh-rlhf", "ultrafeedback", "pairs", "recipe", "manifest"):
        command = [sys.executable, Path(__file__).with_name("fuzz.py"), target, "-runs=100000", "-rss_limit_mb=3000"]
        done = subprocess.run([*command, "-timeout=20"], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert not done.returncode, f"{target}: {done.stderr[-3000:]}"
