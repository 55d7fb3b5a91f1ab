"""A dataset as parquet files, for tools that do not read Arrow streams: one file a split, no text beside the rows."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_data.manifest import Manifest
from orpo_data.places import file_sha256
from orpo_data.shards import iter_tables, open_shard

PARQUET_FOLDER = "parquet"
ROWS_PER_GROUP = 10_000


@dataclass(frozen=True)
class ParquetFile:
    """A split as one file; `path` is relative to the folder that the export was written into."""

    path: str
    split: str
    rows: int
    bytes: int
    sha256: str
    schema: pa.Schema


def write_parquet(dataset: Path, manifest: Manifest, folder: Path) -> list[ParquetFile]:
    """Write every split of `dataset` into `folder`/parquet; the rows keep their order.

    A dataset that was not split is one file, `train.parquet`. The same rows and pyarrow give the same bytes.
    """
    schema = open_shard(dataset / manifest.shards[0].path, manifest.shards[0].sha256).schema
    (folder / PARQUET_FOLDER).mkdir(parents=True)
    rows = dict.fromkeys(manifest.splits or ["train"], 0)
    paths = {split: f"{PARQUET_FOLDER}/{split}.parquet" for split in rows}
    writers = {split: pq.ParquetWriter(folder / path, schema, compression="zstd") for split, path in paths.items()}
    try:
        for split, table in iter_tables(dataset, manifest, ROWS_PER_GROUP):
            writers[split or "train"].write_table(table)
            rows[split or "train"] += len(table)
    finally:
        for writer in writers.values():
            writer.close()
    files = {split: folder / path for split, path in paths.items()}
    return [
        ParquetFile(paths[split], split, rows[split], file.stat().st_size, file_sha256(file), schema)
        for split, file in files.items()
    ]
