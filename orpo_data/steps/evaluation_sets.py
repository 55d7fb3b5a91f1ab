"""Evaluation sets: what a model will be judged on, so that it is not trained on it."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator

from orpo_data.errors import OrpoError
from orpo_data.manifest import digest
from orpo_data.sources.files import ENDINGS, RawFile, find_files, read_records

TEXT_ENDINGS = (*ENDINGS, ".csv", ".txt")

BUILT_IN = {
    "truthful_qa": {  # 817 questions
        "path": "truthfulqa/truthful_qa",
        "revision": "741b8276f2d1982aa3d5b832d3ee81ed3b896490",
        "files": "generation/*.parquet",
        "column": "question",
    },
    "mt_bench": {  # 80 questions of two turns
        "path": "HuggingFaceH4/mt_bench_prompts",
        "revision": "e3a795c5e9a82ee40611c416b8a7786c73198991",
        "files": "raw/question.jsonl",
        "column": "prompt",
    },
    "alpaca_eval": {  # 805 instructions
        "path": "tatsu-lab/alpaca_eval",
        "revision": "2edc6fad8be6b14ea7230aabfd08188da6b8b814",
        "files": "alpaca_eval.json",
        "column": "instruction",
    },
    "ifeval": {  # 541 prompts
        "path": "google/IFEval",
        "revision": "966cd89545d6b6acfd7638bc708b98261ca58e84",
        "files": "ifeval_input_data.jsonl",
        "column": "prompt",
    },
}
"""Where the evaluation sets known by name lie on the hub."""


class EvaluationSource(BaseModel):
    """Where an evaluation set is read from; a built-in one is asked for by its name alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1, description="truthful_qa, mt_bench, alpaca_eval or ifeval, or a name of your own for `path`."
    )
    path: str | None = Field(
        default=None,
        description="Local file, folder or glob (jsonl, json, csv, parquet, arrow; txt with an item a line), hub id or "
        "fsspec URL; of a built-in set a local copy.",
    )
    revision: str | None = Field(default=None, description="Commit on the hub.")
    files: str | None = Field(default=None, description="Glob of the files to read inside a folder or hub id.")
    column: str | None = Field(default=None, description="Column of the question: a text, or a list of turns.")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.name not in BUILT_IN and not self.path:
            raise ValueError(
                f"{self.name!r} is not a built-in evaluation set ({', '.join(BUILT_IN)}): give its `path`, and the "
                "`column` of its questions"
            )
        return self

    def resolved(self) -> "EvaluationSource":
        """With what is known of a built-in set filled in; of a copy of it (`path`) only how to read it."""
        known = BUILT_IN.get(self.name, {})
        if self.path:
            one_file = Path(self.path).is_file()
            known = {key: known[key] for key in known if key == "column" or (key == "files" and not one_file)}
        return self.model_copy(update={key: getattr(self, key) or value for key, value in known.items()})


@dataclass(frozen=True)
class EvaluationSet:
    """The questions of one evaluation set."""

    name: str
    items: tuple[tuple[str, ...], ...]  # the texts (turns) of each item
    path: str = ""
    revision: str | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of the questions in their order: neither file names nor other columns matter."""
        return digest(self.items)


def read_evaluation_set(source: EvaluationSource) -> EvaluationSet:
    """Read (and for a hub id or URL first fetch) an evaluation set.

    Raises:
        OrpoError: it cannot be found or read, lacks its column, or is empty.
    """
    source = source.resolved()
    assert source.path is not None
    where = f"decontaminate: evaluation set {source.name!r}"
    try:
        found = find_files(source.path, source.revision, source.files, endings=TEXT_ENDINGS)
        items = tuple(
            _texts(record, source.column, f"{file.name} row {number}")
            for file in found
            for number, record in enumerate(_records(file))
        )
    except OrpoError as error:
        raise OrpoError(f"{where}: {error}") from error
    if not any(items):
        raise OrpoError(f"{where}: {source.path} is empty, nothing would be compared with it")
    return EvaluationSet(source.name, items, source.path, source.revision)


def _records(file: RawFile) -> Iterator[Any]:
    """Every record of a file: an object, or of a text file a line."""
    ending = file.name.lower().rpartition(".")[2]
    try:
        if ending == "csv":
            with file.path.open(encoding="utf-8-sig", newline="") as lines:
                yield from csv.DictReader(lines, strict=True)
        elif ending == "txt":
            with file.path.open(encoding="utf-8-sig") as lines:  # str.splitlines would also cut within questions
                yield from (line.rstrip("\n") for line in lines)
        else:
            for table in read_records(file, source=""):
                yield from (orjson.loads(record) for record in table["record"].to_pylist())
    except (OSError, ValueError, csv.Error) as error:
        raise OrpoError(f"{file.name}: cannot be read: {error}") from error


def _texts(record: Any, column: str | None, place: str) -> tuple[str, ...]:
    """The texts of a record's question, none if it is empty."""
    if isinstance(record, dict):
        if column not in record:
            wanted = f"no column {column!r}" if column else "say which `column` holds the question"
            raise OrpoError(f"{place}: {wanted}, found: {', '.join(map(str, record)) or 'none'}")
        record = record[column]
    texts = record if isinstance(record, list) else [record]
    if not all(isinstance(text, str | None) for text in texts):
        raise OrpoError(f"{place}: column {column!r} holds neither a text nor a list of texts")
    return tuple(text for text in texts if text and text.strip())
