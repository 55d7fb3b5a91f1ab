"""The `orpo` command: results, exit codes, and one clear line for each kind of bad input."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import orpo_data
from orpo_data.manifest import read_manifest

ROOT = Path(__file__).parents[2]
DATA_STAGES = ["ingest", "binarize", "clean", "split", "tokenize"]


def in_process_of_its_own(*arguments: object, code: str = "from flows.cli import main; main()"):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_answers_within_half_a_second_of_cpu_time():
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = in_process_of_its_own("--help")
        assert done.returncode == 0
        assert all(name in done.stdout for name in ("prepare", "stage", "train", "evaluate", "inspect", "verify"))
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    assert min(cpu_seconds() for _ in range(2)) < 0.5


@pytest.mark.parametrize("command", [[], ["prepare"], ["stage"], ["train"], ["run"], ["serve"]])
def test_help_imports_nothing_heavy(command):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'polars', 'pyarrow', 'transformers', 'prefect', 'datasets', 'accelerate'}\n"
        "atexit.register(lambda: print('imported:', sorted(heavy & set(sys.modules))))\n"
        "from flows.cli import main; main()"
    )
    done = in_process_of_its_own(*command, "--help", code=code)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "imported: []"


# --- what the commands do --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("stage", ["ingest/ultrafeedback", *DATA_STAGES[1:]])
def test_inspect_shows_counts_and_rows(orpo, prepared, stage):
    manifest = read_manifest(prepared / stage)
    done = orpo("inspect", prepared / stage, "--rows", 1)
    assert done.code == 0
    assert f"{manifest.rows} rows" in done.out
    first = orpo_data.load(prepared / stage, split=manifest.splits[0] if manifest.splits else "train")[0]
    assert first["id"] in done.out


def test_inspect_decodes_tokens_and_tells_prompt_from_answer(orpo, prepared):
    done = orpo("inspect", prepared / "tokenize", "--rows", 1)
    row = orpo_data.load(prepared / "tokenize", split="train")[0]
    assert "not in the loss" in done.out
    assert "<|im_start|>assistant" in done.out
    assert f"[{len(row['chosen_input_ids']) - row['prompt_len']} tokens" in done.out


def test_inspect_prints_markup_in_data_as_it_is(orpo, recipe_file, tmp_path):
    folder = tmp_path / "raw-pairs"
    folder.mkdir()
    row = {"prompt": "Is [bold]this[/bold] text [/]?", "chosen": "[red]Yes[/red]", "rejected": "[/nothing]"}
    (folder / "p.jsonl").write_text(json.dumps(row) + "\n")
    recipe = recipe_file(f"sources=[{{dataset: pairs, path: {folder}}}]")
    assert orpo("stage", "ingest", recipe, "-o", tmp_path / "i").code == 0
    done = orpo("inspect", tmp_path / "i" / "pairs")
    assert done.code == 0
    assert all(text in done.out for text in row.values())


def test_names_that_look_like_markup_are_printed_as_they_are(orpo, recipe_file, make_recipe, tmp_path):
    raw = tmp_path / "raw [red]pairs"
    raw.mkdir()
    row = {"prompt": "Q?", "chosen": "Yes.", "rejected": "No."}
    (raw / "a [bold].jsonl").write_text(json.dumps(row) + "\n")
    recipe = recipe_file(f"sources=[{{dataset: pairs, path: '{raw}'}}]")
    output = tmp_path / "out [blue]"
    assert orpo("stage", "ingest", recipe, "-o", output).code == 0
    told = orpo("inspect", output / "pairs").out
    assert str(output / "pairs") in told
    assert "a [bold].jsonl" in told
    row_id = orpo_data.load(output / "pairs", split="train")[0]["id"]
    for arguments in ([], ["--row", row_id]):
        told = orpo("lineage", output / "pairs", *arguments)
        assert told.code == 0
        assert "a [bold].jsonl" in told.out
    assert str(output / "pairs") in orpo("lineage", output / "pairs").out


def test_inspect_of_an_empty_split(orpo, recipe_file, tmp_path):
    assert orpo("prepare", recipe_file("split.eval_fraction=0.0"), "-o", tmp_path / "out").code == 0
    for stage in ("split", "tokenize"):
        done = orpo("inspect", tmp_path / "out" / stage)
        assert done.code == 0
        assert "eval: 0 rows" in done.out


def test_inspect_of_a_model_is_told_in_one_line(orpo, trained):
    done = orpo("inspect", trained.path)
    assert done.code == 1
    assert done.err.startswith(f"orpo: {trained.path}: ")
    assert done.err.count("\n") == 1


def test_inspect_as_json_is_the_manifest(orpo, prepared):
    done = orpo("inspect", prepared / "clean", "--json")
    assert json.loads(done.out)["content_hash"] == read_manifest(prepared / "clean").content_hash


def test_inspect_shows_long_texts_whole_when_asked(orpo, recipe_file, tmp_path):
    folder = tmp_path / "raw-pairs"
    folder.mkdir()
    row = {"prompt": "Q?", "chosen": f"{'word ' * 500}MIDDLE {'word ' * 500}", "rejected": "No."}
    (folder / "p.jsonl").write_text(json.dumps(row) + "\n")
    recipe = recipe_file(f"sources=[{{dataset: pairs, path: {folder}}}]")
    assert orpo("stage", "ingest", recipe, "-o", tmp_path / "i").code == 0
    assert "MIDDLE" not in orpo("inspect", tmp_path / "i" / "pairs").out
    assert "MIDDLE" in orpo("inspect", tmp_path / "i" / "pairs", "--full").out


def test_export_writes_a_file_for_each_split_and_tells_their_rows(orpo, prepared, tmp_path):
    done = orpo("export", prepared / "split", "--to", "llama-factory", "-o", tmp_path / "prefs.jsonl")
    rows = {split: len(orpo_data.load(prepared / "split", split=split)) for split in ("train", "eval")}
    assert done.code == 0
    assert done.out.splitlines() == [
        f"{tmp_path}/prefs-{split}.jsonl: {count} rows of {split}" for split, count in rows.items()
    ]
    told = json.loads(orpo("export", prepared / "clean", "--to", "trl", "-o", tmp_path / "t.jsonl", "--json").out)
    assert told == [{"path": f"{tmp_path}/t.jsonl", "split": "train", "rows": sum(rows.values())}]


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


def test_verify_of_a_sound_dataset(orpo, prepared):
    for stage in DATA_STAGES[1:]:
        done = orpo("verify", prepared / stage)
        assert (done.code, "sound" in done.out) == (0, True)
    assert json.loads(orpo("verify", prepared / "clean", "--json").out)["ok"] is True


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


def test_verify_names_the_broken_file(orpo, own_run):
    shard = next((own_run / "tokenize" / "train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = orpo("verify", own_run / "tokenize")
    assert done.code == 1
    assert done.out.startswith(f"{shard}: its bytes changed")
    shard.unlink()
    (own_run / "tokenize" / "README.md").write_text("changed")
    told = json.loads(orpo("verify", own_run / "tokenize", "--json").out)
    assert told["ok"] is False
    assert [shard.name in told["problems"][0], "README.md" in told["problems"][1]] == [True, True]


def test_lineage_goes_back_to_the_raw_files(orpo, prepared):
    done = orpo("lineage", prepared / "tokenize", "--json")
    chain = json.loads(done.out)
    assert [stage["stage"] for stage in chain["stages"]] == ["ingest", *DATA_STAGES]
    raw = [item["name"] for stage in chain["stages"][:2] for item in stage["inputs"]]
    assert raw == ["train.jsonl", "evol_instruct.jsonl"]
    text = orpo("lineage", prepared / "tokenize")
    assert text.code == 0
    assert all(name in text.out for name in [*raw, *DATA_STAGES])


def test_lineage_of_a_kept_row(orpo, prepared):
    row = orpo_data.load(prepared / "split", split="eval")[0]
    done = orpo("lineage", prepared / "tokenize", "--row", row["id"], "--json")
    (told,) = json.loads(done.out)["rows"]
    place = {"source": row["source"], "file": row["source_file"], "row": row["source_row"]}
    assert told["origin"] == place | {"line": row["source_row"] + 1}
    assert [decision["stage"] for decision in told["decisions"]] == DATA_STAGES
    assert all(decision["kept"] for decision in told["decisions"])
    assert told["decisions"][-1]["split"] == "eval"
    assert f"line {row['source_row'] + 1}\n" in orpo("lineage", prepared / "tokenize", "--row", row["id"][:12]).out


def test_lineage_of_a_dropped_row(orpo, prepared):
    dropped = orpo_data.scan(prepared / "clean", "dropped").collect().to_dicts()
    row = next(row for row in dropped if row["reason"] == "identical_pair")
    done = orpo("lineage", prepared / "tokenize", "--row", row["id"], "--json")
    (told,) = json.loads(done.out)["rows"]
    assert [decision["stage"] for decision in told["decisions"]] == ["ingest", "binarize", "clean"]
    assert told["decisions"][-1]["kept"] is False
    assert told["decisions"][-1]["reason"] == "identical_pair"
    assert "identical_pair" in orpo("lineage", prepared / "tokenize", "--row", row["id"]).out


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


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["prepare", "nowhere.yaml"], 2, "no recipe file 'nowhere.yaml'"),
        (["prepare", "hh-rlhf", "--set", "split.seed"], 2, "write key.path=value"),
        (["stage", "clean", "hh-rlhf", "--input", "nowhere"], 1, "nowhere"),
        (["inspect", "nowhere"], 1, "nowhere"),
        (["verify", "nowhere"], 1, "nowhere"),
        (["lineage", "nowhere"], 1, "nowhere"),
        (["train"], 2, "give a RECIPE, or --dataset DIR and --model M"),
        (["train", "--dataset", "nowhere", "--model", "m", "--set", "train.lamda=1"], 2, "'lambda'"),
        (["train", "--dataset", "nowhere", "--model", "m", "--set", "lambda=1"], 2, "only train.KEY=VALUE"),
        (["train", "--dataset", "nowhere", "--model", "m"], 1, "nowhere"),
        (["evaluate", "nowhere", "--dataset", "elsewhere"], 1, "elsewhere"),
    ],
)
def test_bad_arguments_are_one_line(orpo, tmp_path, monkeypatch, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    done = orpo(*arguments)
    assert done.code == code
    assert says in done.err + done.out
    assert (done.err + done.out).count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["stage", "tokenise", "hh-rlhf"], ["prepare"], ["prepare", "hh-rlhf", "--sett", "a=1"], ["cook"]]
)
def test_wrong_usage_is_two(orpo, arguments):
    assert orpo(*arguments).code == 2


def test_no_such_row(orpo, prepared):
    done = orpo("lineage", prepared / "tokenize", "--row", "zzz")
    assert done.code == 1
    assert done.err.startswith("orpo: no row with id 'zzz'")


def test_terminal_sees_one_error_line_and_the_stages_before_it(recipe_file, own_raw_data, tmp_path):
    """In a process of its own, with logging and progress as users have them."""
    overrides = cut_gzip(own_raw_data)
    assert overrides == []
    done = in_process_of_its_own("prepare", recipe_file(raw=own_raw_data), "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    told = [line for line in done.stderr.splitlines() if line.strip()]
    assert told[-1].startswith("orpo: train.jsonl.gz: the file is broken")
    assert len(told) == 2
    assert told[0].startswith("ingest: running into ")
    assert told[0].endswith(", no output yet")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_results_go_to_stdout_and_logs_to_stderr(recipe_file, tmp_path):
    done = in_process_of_its_own("prepare", recipe_file(), "-o", tmp_path / "out", "--json")
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) == 6
    assert "running" in done.stderr


def test_recipe_fixture_is_what_prepare_read(recipe_file, prepared):
    assert yaml.safe_load(recipe_file().read_text()) == read_manifest(prepared / "clean").recipe
