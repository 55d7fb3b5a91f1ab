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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_data.errors import OrpoError
from orpo_data.manifest import MANIFEST_NAME, read_manifest
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


def parquet_bomb(path: Path, shape: str) -> Path:
    """Two ordinary rows, and between them what a few kilobytes of a parquet file can stand for."""
    text, times = "a" * (4 * CHUNK), 2_000
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    ordinary = pa.array([[{"role": "user", "content": "Q"}]], messages)
    if shape == "rows":  # eight gigabytes
        values = pa.DictionaryArray.from_arrays(pa.array([1] + [0] * times + [1], pa.int32()), pa.array([text, "A"]))
        columns: dict[str, pa.Array] = {"chosen": values}
    elif shape == "messages":  # one row of eight gigabytes
        contents = pa.DictionaryArray.from_arrays(pa.array([1] + [0] * times + [1], pa.int32()), pa.array([text, "A"]))
        flat = pa.StructArray.from_arrays([pa.repeat("user", times + 2), contents], ["role", "content"])
        columns = {"chosen": pa.ListArray.from_arrays(pa.array([0, 1, times + 1, times + 2], pa.int32()), flat)}
    else:  # a long text in one place
        columns = {
            "chosen": pa.concat_arrays([ordinary, pa.array([[{"role": "user", "content": text}]], messages), ordinary])
        }
    pq.write_table(pa.table(columns), path, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False)
    return path


@pytest.mark.parametrize(("shape", "too_long"), [("rows", 2_000), ("messages", 1), ("text", 1)])
def test_a_parquet_file_that_unfolds(tmp_path: Path, shape: str, too_long: int) -> None:
    """What stands once in the file and in many of its rows is not written out before it is measured."""
    path = parquet_bomb(tmp_path / "bomb.parquet", shape)
    assert path.stat().st_size < 5_000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tables = list(read_records(RawFile("bomb.parquet", path), "pairs", limits=Limits(record=2 * CHUNK)))
    records = [record for table in tables for record in table["record"].to_pylist()]
    assert [record.startswith(TOO_LONG) for record in records] == [False] + [True] * too_long + [False]
    assert [row for table in tables for row in table["source_row"].to_pylist()] == list(range(too_long + 2))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 60 * 1024


def test_rows_that_are_long_together(tmp_path: Path) -> None:
    """Each within the limit: as many at a time are written out as are within it together."""
    text, times = "a" * (CHUNK // 8), 3_200  # 400 megabytes
    values = pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int8()), pa.array([text]))
    pq.write_table(pa.table({"chosen": values}), tmp_path / "bomb.parquet", compression="zstd")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file, limits = RawFile("bomb.parquet", tmp_path / "bomb.parquet"), Limits(record=2 * CHUNK)
    sizes = [table["record"].nbytes for table in read_records(file, "pairs", batch_rows=16, limits=limits)]
    assert len(sizes) == times / 16
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 1024


@pytest.mark.parametrize("shape", ["deltas", "nulls", "text", "bytes"])
def test_a_row_group_that_unfolds(make_recipe: Callable[..., Recipe], tmp_path: Path, shape: str) -> None:
    """What cannot be measured piece by piece is refused as a whole."""
    columns = {
        "deltas": pa.array(["a" * 100_000] * 100),
        "nulls": pa.array([[None] * CHUNK], pa.list_(pa.int64())),
        "text": pa.array(["a" * (3 * CHUNK)]),
        "bytes": pa.array([b"a" * 5_000] * 1_000, pa.binary(5_000)),
    }
    encoding: dict[str, Any] = {"column_encoding": {"chosen": "DELTA_BYTE_ARRAY"}, "use_dictionary": False}
    path = tmp_path / "bomb.parquet"
    pq.write_table(
        pa.table({"chosen": columns[shape]}), path, compression="zstd", **encoding if shape == "deltas" else {}
    )
    assert path.stat().st_size < 5_000
    source = json.dumps([{"dataset": "pairs", "path": str(path), "max_array_bytes": 2 * CHUNK}])
    with pytest.raises(
        OrpoError, match=r"row group 0 may unfold to [\d,]+ bytes, more than 2,097,152.*max_array_bytes"
    ):
        prepare(make_recipe(f"sources={source}"), tmp_path / "run")


# --- by coverage ------------------------------------------------------------------------------------------------------


PAIRS = [
    {"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 4.5, "system": "S"},
    {
        side: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": side}]
        for side in ("chosen", "rejected")
    },
    {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"}, "rejected": "B"},
]


def seeds(target: str, raw: Path, recipe: Path, prepared: Path) -> list[bytes]:
    """Inputs that pass, for libFuzzer to start from."""
    hh, uf = (raw / name for name in ("hh/train.jsonl", "uf/evol_instruct.jsonl"))
    records = [json.loads(line) for line in hh.read_bytes().splitlines()[:4]]
    tables = pa.BufferOutputStream(), pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(PAIRS[:1] * 3), tables[0])
    with pa.ipc.new_stream(tables[1], (table := pa.Table.from_pylist(PAIRS[:1] * 3)).schema) as writer:
        writer.write_table(table)
    return {
        "lines": [hh.read_bytes(), uf.read_bytes()],
        "array": [json.dumps(records).encode(), json.dumps(PAIRS).encode()],
        "parquet": [bytes(tables[0].getvalue())],
        "arrow": [bytes(tables[1].getvalue())],
        "hh-rlhf": hh.read_bytes().splitlines(),
        "ultrafeedback": uf.read_bytes().splitlines(),
        "pairs": [json.dumps(record).encode() for record in PAIRS],
        "recipe": [recipe.read_bytes()],
        "manifest": [(prepared / stage / MANIFEST_NAME).read_bytes() for stage in ("binarize", "tokenize")],
    }[target]


@pytest.mark.faults
@pytest.mark.parametrize(
    "target", ["lines", "array", "parquet", "arrow", "hh-rlhf", "ultrafeedback", "pairs", "recipe", "manifest"]
)
def test_parsers_by_coverage(target: str, raw_data: Path, recipe_yaml: Path, prepared: Path, tmp_path: Path) -> None:
    """atheris (libFuzzer) steers its inputs into new branches of the readers and parsers: 100,000 of them."""
    pytest.importorskip("atheris")
    (tmp_path / "seeds").mkdir()
    for number, content in enumerate(seeds(target, raw_data, recipe_yaml, prepared)):
        (tmp_path / "seeds" / str(number)).write_bytes(content)
    command = [
        sys.executable,
        Path(__file__).with_name("fuzz.py"),
        target,
        "-runs=100000",
        "-rss_limit_mb=3000",
    ]
    done = subprocess.run([*command, "-timeout=20", "seeds"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert not done.returncode, done.stderr[-3000:]
