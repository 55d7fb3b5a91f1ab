"""Evaluation sets of every kind are read; one that would silently compare nothing is refused in a line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from orpo_data.errors import OrpoError
from orpo_data.steps.evaluation_sets import BUILT_IN, EvaluationSource, read_evaluation_set

QUESTIONS = ["What is rain?", "Who sees the wind, and when?"]
ROWS = [{"id": i, "question": question} for i, question in enumerate(QUESTIONS)]


def read(**source: Any) -> Any:
    return read_evaluation_set(EvaluationSource(**{"name": "mine", **source}))


def write(file: Path, kind: str) -> Path:
    lines = "\n".join(map(json.dumps, ROWS))
    file = file.with_name(f"questions.{kind}")
    match kind:
        case "jsonl":
            file.write_text(lines)
        case "jsonl.gz":
            file.write_bytes(gzip.compress(lines.encode()))
        case "json":
            file.write_text(json.dumps(ROWS))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), file)
        case "csv":
            file.write_text("\ufeffid,question\n" + "".join(f'{row["id"]},"{row["question"]}"\n' for row in ROWS))
        case "txt":
            file.write_text("\ufeff" + "\r\n".join(QUESTIONS) + "\n")
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "txt"])
def test_every_kind_of_file_holds_the_same_questions(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "x", kind)
    found = read(path=str(file), column="question")
    assert found.items == tuple((question,) for question in QUESTIONS)
    assert read(path=str(tmp_path), column="question") == type(found)("mine", found.items, str(tmp_path))
    assert read(path=file.as_uri(), column="question").digest == found.digest


def test_a_line_of_a_text_ends_where_the_line_ends(tmp_path: Path) -> None:
    """str.splitlines cuts at much else, and half a question is found nowhere."""
    (tmp_path / "q.txt").write_text("one\u2028half\x0band\x1cmore\x85\ntwo\n", encoding="utf-8")
    assert read(path=str(tmp_path / "q.txt")).items == (("one\u2028half\x0band\x1cmore\x85",), ("two",))


def test_the_digest_is_that_of_the_questions(tmp_path: Path) -> None:
    first, second = (write(tmp_path / "x", kind) for kind in ("csv", "json"))
    digests = {read(path=str(file), column="question").digest for file in (first, second)}
    assert len(digests) == 1
    second.write_text(json.dumps(ROWS[::-1]))  # items are named by their number
    assert read(path=str(second), column="question").digest not in digests


def test_questions_of_several_turns_and_none(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": ["One?", "And two?"]}\n{"prompt": null}\n{"prompt": " "}\n{"prompt": "Three?"}\n')
    assert read(path=str(file), column="prompt").items == (("One?", "And two?"), (), (), ("Three?",))


LAYOUT = {
    "truthful_qa": ("generation/validation-00000-of-00001.parquet", {"type": "Adversarial", "question": "Why?"}),
    "mt_bench": ("raw/question.jsonl", {"prompt_id": 1, "category": "writing", "prompt": ["Why?"], "reference": []}),
    "alpaca_eval": ("alpaca_eval.json", {"instruction": "Why?", "output": "So.", "generator": "a", "dataset": "b"}),
    "ifeval": ("ifeval_input_data.jsonl", {"key": 1, "prompt": "Why?", "instruction_id_list": [], "kwargs": []}),
}


def write_layout(folder: Path, name: str) -> Path:
    """A built-in set as it lies on the hub, and files beside it that are not to be read."""
    place, row = LAYOUT[name]
    file = folder / place
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), file)
    else:
        file.write_text(json.dumps([row]) if file.suffix == ".json" else json.dumps(row))
    (folder / "other").mkdir()
    (folder / "other/validation.jsonl").write_text('{"unlike": 1}')
    return file


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets_from_a_local_copy(tmp_path: Path, name: str) -> None:
    file = write_layout(tmp_path, name)
    for path in (tmp_path, file):
        found = read(name=name, path=str(path))
        assert found.items == (("Why?",),)
        assert (found.path, found.revision) == (str(path), None)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets_are_fetched_at_a_pinned_revision(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"], options["repo_type"], options["allow_patterns"]))
        return str(tmp_path)

    write_layout(tmp_path, name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = read(name=name)
    known = BUILT_IN[name]
    assert asked == [(known["path"], known["revision"], "dataset", [known["files"]])]
    assert len(known["revision"]) == 40
    assert (found.items, found.path, found.revision) == ((("Why?",),), known["path"], known["revision"])


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ("", "question", "'mine': {path} is empty, nothing would be compared with it"),
        ('{"question": ""}', "question", "'mine': {path} is empty, nothing would be compared with it"),
        ('{"id": 1, "q": "Why?"}', "question", "'mine': q.jsonl row 0: no column 'question', found: id, q"),
        ('{"id": 1, "q": "Why?"}', None, "'mine': q.jsonl row 0: say which `column` holds the question, found: id, q"),
        ('{"q": "Why?"}\n{"x": 1}', "q", "'mine': q.jsonl row 1: no column 'q', found: x"),
        ('{"q": 1}', "q", "'mine': q.jsonl row 0: column 'q' holds neither a text nor a list of texts"),
        ('{"q": "Why', "q", "'mine': q.jsonl: cannot be read: "),
    ],
)
def test_a_set_that_cannot_be_used(tmp_path: Path, content: str, column: str | None, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(content)
    with pytest.raises(OrpoError) as error:
        read(path=str(file), column=column)
    assert str(error.value).startswith("decontaminate: evaluation set " + message.format(path=file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content"), [("q.csv", b"q\n\xff\n"), ("q.txt", b"\xff"), ("q.csv", b'q\n"open\n')])
def test_a_broken_text_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OrpoError, match=f"^decontaminate: evaluation set 'mine': {name}: cannot be read: "):
        read(path=str(tmp_path / name), column="q")


def test_nothing_there() -> None:
    with pytest.raises(OrpoError, match=r"^decontaminate: evaluation set 'mine': nowhere.jsonl: no such file"):
        read(path="nowhere.jsonl", column="q")


def test_an_unknown_name() -> None:
    with pytest.raises(ValidationError, match="'gsm8k' is not a built-in evaluation set"):
        EvaluationSource.model_validate("gsm8k")
