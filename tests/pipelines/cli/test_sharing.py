"""`orpo export` and `orpo push`."""

import json

import pytest

import orpo_data


def test_export_writes_a_file_for_each_split_and_tells_their_rows(orpo, prepared, tmp_path):
    done = orpo("export", prepared / "split", "--to", "llama-factory", "-o", tmp_path / "prefs.jsonl")
    rows = {split: len(orpo_data.load(prepared / "split", split=split)) for split in ("train", "eval")}
    assert done.code == 0
    assert done.out.splitlines() == [
        f"{tmp_path}/prefs-{split}.jsonl: {count} rows of {split}" for split, count in rows.items()
    ]
    told = json.loads(orpo("export", prepared / "clean", "--to", "trl", "-o", tmp_path / "t.jsonl", "--json").out)
    assert told == [{"path": f"{tmp_path}/t.jsonl", "split": "train", "rows": sum(rows.values())}]


def test_export_into_a_folder_that_is_not_there_yet(orpo, prepared, tmp_path):
    done = orpo("export", prepared / "split", "--to", "trl", "-o", tmp_path / "ex")
    assert [line.split(":")[0] for line in done.out.splitlines()] == [
        f"{tmp_path}/ex/trl-train.jsonl",
        f"{tmp_path}/ex/trl-eval.jsonl",
    ]


def test_export_of_token_ids_is_told_in_one_line(orpo, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = orpo("export", prepared / "tokenize", "--to", "trl")
    assert done.code == 1
    assert done.err.startswith(f"orpo: {prepared / 'tokenize'}: holds token ids, ")
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert orpo("export", prepared / "clean", "--to", "nobody").code == 2
    assert orpo("export", prepared / "clean", "--to", "openai").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["openai.jsonl"]


def test_push_tells_what_went_where(orpo, prepared, tmp_path):
    done = orpo("push", prepared / "split", "--to", tmp_path / "there")
    assert done.code == 0
    names = sorted(file.relative_to(tmp_path / "there").as_posix() for file in (tmp_path / "there").rglob("*.*"))
    assert sorted(line.split()[-1] for line in done.out.splitlines()[:-1]) == [n for n in names if "." in n]
    assert done.out.splitlines()[-1].endswith(f" MB in {tmp_path / 'there'}")
    assert orpo_data.verify(tmp_path / "there").ok
    told = json.loads(orpo("push", prepared / "clean", "--to", tmp_path / "there", "--json").out)
    assert told["target"] == str(tmp_path / "there")
    assert "eval/data-00000-of-00002.arrow" in told["removed"]


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [("there", 2, "write ./there for a folder"), ("nosuch://x", 2, "nosuch"), (".", 1, "holds something else")],
)
def test_push_to_a_place_that_is_none(orpo, prepared, place, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.tex").touch()
    done = orpo("push", prepared / "split", "--to", place)
    assert done.code == code
    assert said in done.err
    assert len(done.err.splitlines()) == 1
