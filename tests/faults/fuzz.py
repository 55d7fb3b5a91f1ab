"""A parser under atheris: `python tests/faults/fuzz.py TARGET -runs=100000`. Whatever it raises on purpose is fine."""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["orpo_data.sources", "orpo_data.steps.parse", "orpo_data.manifest", "pipelines"]
):
    import pyarrow as pa

    from orpo_data.errors import OrpoError
    from orpo_data.manifest import MANIFEST_NAME, read_manifest
    from orpo_data.schema import RAW
    from orpo_data.sources.files import RawFile, read_records
    from orpo_data.steps.parse import Parse
    from pipelines.recipe import Recipe

PLACE = Path(tempfile.mkdtemp())
FILES = {"lines": "f.jsonl", "array": "f.json", "parquet": "f.parquet", "arrow": "f.arrow"}


def read(name: str, data: bytes) -> None:
    (PLACE / name).write_bytes(data)
    for table in read_records(RawFile(name, PLACE / name), "fuzz"):
        assert table.schema == RAW


def parse(dataset: str, data: bytes) -> None:
    """Two records, so that columns are tried as well."""
    records = [part.decode(errors="replace") for part in data.split(b"\n", 1)]
    columns = {"source": "fuzz", "source_file": "f", "source_row": 0}
    table = pa.Table.from_pylist([columns | {"record": record} for record in records], schema=RAW)
    out = Parse(dataset=dataset).apply(table)
    assert len(out.kept) + len(out.dropped) == len(table)


def manifest(data: bytes) -> None:
    (PLACE / MANIFEST_NAME).write_bytes(data)
    read_manifest(PLACE)


def recipe(data: bytes) -> None:
    (PLACE / "recipe.yaml").write_bytes(data)
    Recipe.read(PLACE / "recipe.yaml")


def one_input(data: bytes) -> None:
    try:
        if TARGET in FILES:
            read(FILES[TARGET], data)
        elif TARGET in ("manifest", "recipe"):
            {"manifest": manifest, "recipe": recipe}[TARGET](data)
        else:
            parse(TARGET, data)
    except OrpoError:
        pass


if __name__ == "__main__":
    TARGET = sys.argv.pop(1)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
