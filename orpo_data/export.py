"""Cleaned pairs as JSON lines in the form that another trainer reads."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import read_manifest
from orpo_data.places import as_path, write_whole
from orpo_data.schema import TOKEN_STAGES
from orpo_data.shards import scan
from orpo_data.views import CLEANED, TEXT_VIEWS

SUFFIXES = (".jsonl", ".ndjson", ".json")  # the last as LLaMA-Factory calls such files
DATASET_INFO = "dataset_info.json"
LLAMA_FACTORY_COLUMNS = {
    "messages": "conversations",
    "system": "system",
    "chosen": "chosen",
    "rejected": "rejected",
}


@dataclass(frozen=True)
class ExportedFile:
    """One file that an export wrote."""

    path: Path
    split: str
    rows: int


def export(dataset: str | Path, to: str, output: str | Path) -> list[ExportedFile]:
    """Write each split of a cleaned dataset as JSON lines in the form of `to`, one of TEXT_VIEWS.

    `output` is the file, `prefs.jsonl`, or a folder, in which the file is called after the form, `trl.jsonl`; a dataset
    with several splits has one file each, `prefs-train.jsonl` and so on. For LLaMA-Factory the files are also entered
    in the `dataset_info.json` beside them. No file is touched before all rows are written, and each then takes its
    place whole.

    Raises OrpoError for a dataset without text or with pairs that are not cleaned, UsageError for an unknown `to` and
    for a file that is not to be one of JSON lines.
    """
    folder = as_path(dataset)
    if to not in TEXT_VIEWS:
        raise UsageError(f"--to {to!r}: unknown form, there are {', '.join(TEXT_VIEWS)}")
    manifest = read_manifest(folder)
    if manifest.stage not in CLEANED:
        holds = "holds token ids" if manifest.stage in TOKEN_STAGES else f"is the output of {manifest.stage}"
        raise OrpoError(f"{folder}: {holds}, an export takes cleaned text; give the folder of clean or split")
    output = _file_for(Path(output), to)
    files = []
    for split in manifest.splits or ["train"]:
        name = f"{output.stem}-{split}{output.suffix}" if len(manifest.splits) > 1 else output.name
        rows = sum(shard.rows for shard in manifest.shards if shard.split in (split, None))
        files.append(ExportedFile(output.with_name(name), split, rows))
    output.parent.mkdir(parents=True, exist_ok=True)
    info = _llama_factory_info(files) if to == "llama-factory" else None
    try:
        for file in files:
            TEXT_VIEWS[to](scan(folder, file.split)).sink_ndjson(_partial(file.path))
        for file in files:
            os.replace(_partial(file.path), file.path)
    finally:
        for file in files:
            _partial(file.path).unlink(missing_ok=True)
    if info is not None:
        write_whole(output.with_name(DATASET_INFO), json.dumps(info, indent=2, ensure_ascii=False) + "\n")
    return files


def _file_for(output: Path, to: str) -> Path:
    if output.is_dir() or not output.suffix:
        return output / f"{to}.jsonl"
    if output.suffix not in SUFFIXES:
        raise UsageError(f"--output {output}: give a folder, or a file of JSON lines: {output.with_suffix('.jsonl')}")
    return output


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _llama_factory_info(files: list[ExportedFile]) -> dict[str, Any]:
    """What `dataset_info.json` says once the files are entered; what others entered there stays.

    https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
    """
    place = files[0].path.with_name(DATASET_INFO)
    try:
        info = json.loads(place.read_text("utf-8"))
    except FileNotFoundError:
        info = {}
    except ValueError as error:
        raise OrpoError(f"{place}: is no JSON ({error}); mend it or export into another folder") from None
    if not isinstance(info, dict):
        raise OrpoError(f"{place}: is no JSON object; mend it or export into another folder")
    entries = {
        file.path.stem: {
            "file_name": file.path.name,
            "formatting": "sharegpt",
            "ranking": True,
            "columns": LLAMA_FACTORY_COLUMNS,
        }
        for file in files
    }
    return info | entries
