"""`orpo prepare` and `orpo stage`: results, and one clear line for each kind of bad input."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import yaml

import orpo_data
from orpo_data.manifest import read_manifest

DATA_STAGES = ["ingest", "binarize", "clean", "split", "tokenize"]


def test_prepare_tells_each_stage_and_writes_it(orpo, recipe_file, tmp_path, prepared):
    done = orpo("prepare", recipe_file(), "-o", tmp_path / "out", "--json")
    assert done.code == 0
    reports = json.loads(done.out)
    assert [report["stage"] for report in reports] == ["ingest", *DATA_STAGES]
    assert all(report["ran"] for report in reports)
    assert reports[-1]["path"] == str(tmp_path / "out" / "tokenize")
    assert reports[-1]["content_hash"] == read_manifest(prepared / "tokenize").content_hash
    again = orpo("prepare", recipe_file(), "-o", tmp_path / "out")
    assert again.out.count("unchanged") == 6
    assert "unparsable" in again.out


def test_stages_one_by_one_write_what_prepare_writes(orpo, recipe_file, prepared, tmp_path, monkeypatch):
    recipe = recipe_file()
    monkeypatch.chdir(tmp_path)
    for name in DATA_STAGES:
        assert orpo("stage", name, recipe).code == 0
    folders = ["ingest/hh-rlhf", "ingest/ultrafeedback", *DATA_STAGES[1:]]
    for folder in folders:
        one, other = read_manifest(tmp_path / "runs" / "test" / folder), read_manifest(prepared / folder)
        assert (one.fingerprint, one.content_hash) == (other.fingerprint, other.content_hash)


def test_a_stage_reads_and_writes_where_it_is_told(orpo, recipe_file, prepared, tmp_path):
    done = orpo("stage", "clean", recipe_file(), "--input", prepared / "binarize", "-o", tmp_path / "c", "--json")
    assert done.code == 0
    assert read_manifest(tmp_path / "c").content_hash == read_manifest(prepared / "clean").content_hash
    assert json.loads(done.out)[0]["stage"] == "clean"


def test_set_changes_the_recipe(orpo, recipe_file, prepared, tmp_path):
    arguments = ["stage", "clean", recipe_file(), "--input", prepared / "binarize", "-o", tmp_path / "c"]
    assert orpo(*arguments, "--set", "name=other").code == 0
    assert read_manifest(tmp_path / "c").recipe["name"] == "other"


# --- bad input -------------------------------------------------------------------------------------------------------


def missing_file(raw: Path) -> list[str]:
    return [f"sources.0.path={raw / 'nowhere.jsonl'}"]


def wrong_column(raw: Path) -> list[str]:
    (raw / "hh" / "train.jsonl").write_text('{"good": "\\n\\nHuman: a", "bad": "\\n\\nHuman: b"}\n')
    return []


def mapped_column_missing(raw: Path) -> list[str]:
    file = raw / "p.jsonl"
    file.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    return [f"sources.0={{dataset: pairs, path: {file}, name: hh-rlhf, columns: {{score_chosen: stars}}}}"]


def cut_gzip(raw: Path) -> list[str]:
    plain = raw / "hh" / "train.jsonl"
    whole = gzip.compress(plain.read_bytes())
    (raw / "hh" / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    plain.unlink()
    return []


def broken_parquet(raw: Path) -> list[str]:
    (raw / "hh" / "more.parquet").write_bytes(b"PAR1 no more")
    return []


def no_data_files(raw: Path) -> list[str]:
    (raw / "hh" / "train.jsonl").rename(raw / "hh" / "train.csv")
    return []


def unknown_template(raw: Path) -> list[str]:
    return ["tokenize.chat_template=chatlm"]


def template_without_prefix(raw: Path) -> list[str]:
    template = raw / "moves.jinja"
    template.write_text(
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    return [f"tokenize.chat_template={template}"]


def no_tokenizer(raw: Path) -> list[str]:
    (raw / "empty").mkdir()
    return [f"tokenize.tokenizer={raw / 'empty'}"]


@pytest.mark.parametrize(
    ("spoil", "code", "names"),
    [
        (missing_file, 1, ["nowhere.jsonl", "no such file"]),
        (wrong_column, 1, ["train.jsonl", "'chosen'", "good, bad"]),
        (mapped_column_missing, 1, ["p.jsonl", "'stars'"]),
        (cut_gzip, 1, ["train.jsonl.gz", "broken"]),
        (broken_parquet, 1, ["more.parquet", "broken"]),
        (no_data_files, 1, ["/hh", "no data files"]),
        (unknown_template, 2, ["tokenize.chat_template", "'chatlm'", "chatml"]),
        (template_without_prefix, 1, ["tokenize.chat_template", "prefix"]),
        (no_tokenizer, 1, ["tokenize.tokenizer", "empty"]),
        (lambda raw: ["sources.0.pth=x"], 2, ["recipe.yaml", "'sources.0.pth'", "'path'"]),
        (lambda raw: ["train.lamda=1"], 2, ["recipe.yaml", "'train.lamda'", "'lambda'"]),
        (lambda raw: ["sources.0.dataset=hh"], 2, ["sources.0.dataset", "'hh'", "hh-rlhf"]),
        (lambda raw: ["tokenize.max_prompt_length=500"], 2, ["max_prompt_length", "500"]),
    ],
)
def test_bad_input_is_one_line_and_harms_nothing(
    orpo, recipe_file, own_raw_data, own_run, snapshot, spoil, code, names
):
    overrides = [argument for override in spoil(own_raw_data) for argument in ("--set", override)]
    recipe = recipe_file(raw=own_raw_data)
    before = snapshot(own_run)
    done = orpo("prepare", recipe, "-o", own_run, *overrides)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("orpo: ")
    assert done.err.count("\n") == 1
    assert [name for name in names if name not in done.err] == []
    assert snapshot(own_run) == before


def test_tokenizer_without_template_names_the_remedy(orpo, recipe_file, plain_tokenizer_dir, own_run, snapshot):
    before = snapshot(own_run)
    done = orpo("prepare", recipe_file(), "-o", own_run, "--set", f"tokenize.tokenizer={plain_tokenizer_dir}")
    assert done.code == 2
    assert "no chat template of its own; set tokenize.chat_template" in done.err
    assert done.err.count("\n") == 1
    assert snapshot(own_run) == before


def test_no_rows_left_after_cleaning(orpo, recipe_file, own_raw_data, own_run, snapshot):
    (own_raw_data / "hh" / "train.jsonl").write_text(
        '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: b"}\n' * 3
    )
    recipe = recipe_file(f"sources=[{{dataset: hh-rlhf, path: {own_raw_data / 'hh'}}}]", raw=own_raw_data)
    before = snapshot(own_run)
    done = orpo("prepare", recipe, "-o", own_run)
    assert done.code == 1
    assert done.err == "orpo: clean: no rows left of 3 (3 identical_pair)\n"
    after = snapshot(own_run)
    for stage in ("clean", "split", "tokenize"):
        assert {k: v for k, v in before.items() if k.startswith(stage)} == {
            k: v for k, v in after.items() if k.startswith(stage)
        }


@pytest.mark.parametrize("stage", ["ingest/hh-rlhf", "clean", "tokenize"])
def test_output_that_holds_something_else(orpo, recipe_file, tmp_path, snapshot, stage):
    folder = tmp_path / "out" / stage
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    before = snapshot(folder)
    done = orpo("prepare", recipe_file(), "-o", tmp_path / "out")
    assert done.code == 1
    assert done.err.startswith(f"orpo: {folder}: holds something else")
    assert done.err.count("\n") == 1
    assert snapshot(folder) == before


def test_a_file_added_to_an_output_is_not_deleted(orpo, recipe_file, own_raw_data, own_run, snapshot):
    (own_run / "clean" / "thesis.txt").write_text("years of work")
    before = snapshot(own_run / "clean")
    done = orpo("stage", "clean", recipe_file(), "--input", own_run / "split", "-o", own_run / "clean")
    assert done.code == 1
    assert "is the output of split, the output of binarize is needed" in done.err
    (own_raw_data / "hh" / "train.jsonl").write_text(
        "".join((own_raw_data / "hh" / "train.jsonl").read_text().splitlines(keepends=True)[:20])
    )
    done = orpo("prepare", recipe_file(raw=own_raw_data), "-o", own_run)
    assert done.code == 1
    assert "thesis.txt" in done.err
    assert snapshot(own_run / "clean") == before


def test_broken_json_costs_its_line_alone(prepared):
    dropped = orpo_data.scan(prepared / "ingest" / "hh-rlhf", "dropped").collect().to_dicts()
    assert [(row["source_file"], row["source_row"], row["reason"]) for row in dropped] == [
        ("train.jsonl", 40, "unparsable")
    ]


def test_output_that_is_a_file(orpo, recipe_file, tmp_path):
    (tmp_path / "out").write_text("a file")
    done = orpo("prepare", recipe_file(), "-o", tmp_path / "out")
    assert done.code == 1
    assert str(tmp_path / "out") in done.err
    assert done.err.count("\n") == 1
    assert (tmp_path / "out").read_text() == "a file"


def test_terminal_sees_one_error_line_and_the_stages_before_it(own_process, recipe_file, own_raw_data, tmp_path):
    """In a process of its own, with logging and progress as users have them."""
    overrides = cut_gzip(own_raw_data)
    assert overrides == []
    done = own_process("prepare", recipe_file(raw=own_raw_data), "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    told = [line for line in done.stderr.splitlines() if line.strip()]
    assert told[-1].startswith("orpo: train.jsonl.gz: the file is broken")
    assert len(told) == 2
    assert told[0].startswith("ingest: running into ")
    assert told[0].endswith(", no output yet")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_results_go_to_stdout_and_logs_to_stderr(own_process, recipe_file, tmp_path):
    done = own_process("prepare", recipe_file(), "-o", tmp_path / "out", "--json")
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) == 6
    assert "running" in done.stderr


def test_recipe_fixture_is_what_prepare_read(recipe_file, prepared):
    assert yaml.safe_load(recipe_file().read_text()) == read_manifest(prepared / "clean").recipe
