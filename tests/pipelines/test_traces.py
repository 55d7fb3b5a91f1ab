"""What `orpo lineage` and `orpo diff` print, for people and for scripts."""

import json
import re

import pytest

import orpo_data
from orpo_data.distributions import Shift
from orpo_data.manifest import read_manifest
from pipelines import prepare, stages
from pipelines.traces import _figures


def test_the_way_of_a_row_step_by_step(orpo, prepared):
    done = orpo("lineage", prepared / "tokenize", "--file", "evol_instruct.jsonl", "--line", 4)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].endswith("from ultrafeedback: evol_instruct.jsonl line 4")
    assert lines[2] == "    parse: kept, subset evol_instruct, answers 4"
    (binarized,) = [line for line in lines if line.startswith("    binarize: ")]
    assert "scores [alpaca-7b 3, gpt-4 4.667, llama-2-7b-chat 2.667, falcon-40b-instruct 1.25], drawn " in binarized
    assert [line for line in lines if line.startswith("    truncate: kept, chosen_input_tokens")]


def test_why_a_row_fell(orpo, prepared):
    done = orpo("lineage", prepared / "tokenize", "--file", "train.jsonl", "--line", 41)
    assert done.out.splitlines() == [
        "no id  from hh-rlhf: train.jsonl line 41",
        "  ingest: dropped by parse: unparsable",
        "    parse: unparsable (line 41, column 27: unexpected end of data)",
    ]


def test_a_duplicate_and_the_row_it_fell_for(orpo, own_raw_data, make_recipe, tmp_path):
    file = own_raw_data / "hh/train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0]]))
    prepare(make_recipe("dedup={}", raw=own_raw_data), tmp_path / "run")
    arguments = ["lineage", tmp_path / "run/tokenize", "--file", "train.jsonl", "--line", 49]
    told = orpo(*arguments).out.splitlines()
    at = told.index("  the row named above:")
    assert told[at - 1].startswith("    dedup: duplicate_pair (of ")
    assert told[at + 1].endswith("from hh-rlhf: train.jsonl line 1")
    assert told[at + 2].startswith("      ingest: kept as ")
    (row,) = json.loads(orpo(*arguments, "--json").out)["rows"]
    assert [other["origin"]["line"] for other in row["related"]] == [1]
    assert row["decisions"][-1]["steps"][-1]["reason"] == row["decisions"][-1]["reason"] == "duplicate_pair"


def test_records_of_other_files_have_numbers_not_lines(orpo, make_recipe, tmp_path):
    rows = [{"prompt": f"Q{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(3)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    recipe = make_recipe(f"sources=[{{dataset: pairs, path: '{tmp_path / 'p.json'}'}}]")
    stages.ingest(recipe.sources[0], recipe, tmp_path / "i")
    assert "pairs: p.json record 2\n" in orpo("lineage", tmp_path / "i", "--file", "p.json", "--line", 2).out


def test_a_file_as_a_table_and_as_values(orpo, prepared):
    done = orpo("lineage", prepared / "tokenize", "--file", "evol_instruct.jsonl")
    lines = done.out.splitlines()
    assert lines[0] == "23 rows"
    assert {"  1 dropped by binarize: tie", "  1 dropped by binarize: too_few_completions"} < set(lines)
    assert len(lines) == 1 + 5 + 2 + 23
    assert lines[8 + 20].split(maxsplit=2)[2] == "dropped by binarize: tie (all answers have mean-rating 4)"
    ends = json.loads(orpo("lineage", prepared / "tokenize", "--file", "evol_instruct.jsonl", "--json").out)["ends"]
    assert [end["source_row"] for end in ends] == list(range(23))
    assert ends[20]["reason"] == "tie"
    assert f"  {sum(end['split'] == 'train' for end in ends)} kept in train" in lines


def test_a_chain_with_a_newer_part_is_not_trusted_in_silence(orpo, own_run, make_recipe):
    stages.split(own_run / "clean", make_recipe("split.seed=1"), own_run / "split")
    row = orpo_data.load(own_run / "tokenize")[0]["id"]
    for arguments in ([], ["--row", row], ["--file", "train.jsonl"]):
        assert "changed since the next stage read it" in orpo("lineage", own_run / "tokenize", *arguments).out


def test_a_difference(orpo, prepared, tmp_path, make_recipe):
    recipe = make_recipe("tokenize.max_prompt_length=40")
    stages.tokenize(prepared / "split", recipe, tmp_path / "new")
    done = orpo("diff", prepared / "tokenize", tmp_path / "new")
    assert done.code == 0
    lost = read_manifest(prepared / "tokenize").rows - read_manifest(tmp_path / "new").rows
    assert f"{lost} rows went\n  {lost} now dropped in tokenize by truncate: prompt_too_long\n" in done.out
    assert "0 rows came" in done.out
    assert "truncate.max_prompt_length: 96 -> 40" in done.out
    (prompts,) = [line for line in done.out.splitlines() if "prompt_tokens" in line]
    assert re.search(r"prompt_tokens +[\d.]+ % +median \d+ → \d+, p95 \d+ → \d+, mean [\d.]+ → [\d.]+ *$", prompts)
    back = orpo("diff", tmp_path / "new", prepared / "tokenize").out
    assert f"  {lost} before dropped in tokenize by truncate: prompt_too_long\n" in back
    told = json.loads(orpo("diff", prepared / "tokenize", tmp_path / "new", "--json").out)
    assert told == json.loads(json.dumps(orpo_data.diff(prepared / "tokenize", tmp_path / "new").to_json()))


def test_no_difference(orpo, prepared):
    done = orpo("diff", prepared / "clean", prepared / "clean")
    assert done.out.splitlines()[-1] == "the same rows, made in the same way"
    assert json.loads(orpo("diff", prepared / "clean", prepared / "clean", "--json").out)["empty"] is True


def test_names_that_look_like_markup_are_printed_as_they_are(orpo, own_run, make_recipe, tmp_path):
    folder = tmp_path / "new [bold]"
    stages.clean(own_run / "binarize", make_recipe("clean.ties=keep"), folder)
    assert str(folder) in orpo("diff", own_run / "clean", folder).out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["diff", "nowhere", "elsewhere"], 1, "nowhere: not a dataset folder"),
        (["lineage", "{clean}", "--line", "3"], 2, "ask for a row, or for a file"),
        (["lineage", "{clean}", "--file", "x"], 1, "no raw file 'x'"),
        (["diff", "{clean}", "{clean}/../split"], 1, "compare two versions of one stage's output"),
    ],
)
def test_bad_arguments_are_one_line(orpo, prepared, arguments, code, says):
    done = orpo(*(argument.format(clean=prepared / "clean") for argument in arguments))
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert says in done.err


@pytest.mark.parametrize(
    ("column", "old", "new", "said"),
    [
        ("source", {"hh": 0.25, "uf": 0.75}, {"hh": 0.2, "uf": 0.8}, "hh 25.0 % → 20.0 %, uf 75.0 % → 80.0 %"),
        ("source", {"hh": 0.0, "uf": 0.5}, {"hh": 0.0001, "uf": 0.5}, "hh 0.0 % → < 0.1 %"),
        (
            "prompt_tokens",
            {"median": 40.0, "mean": 41.256},
            {"median": 40.0, "mean": 38.0},
            "median 40, mean 41.26 → 38",
        ),
        ("prompt_characters", {"median": 12345.5}, {"median": 12000.0}, "median 12,346 → 12,000"),
        ("score_chosen", {"median": 4.0}, {"median": None}, "median 4 → -"),
    ],
)
def test_where_a_column_moved_to(column, old, new, said):
    assert _figures(Shift(column, 0.1, old, new)) == said
