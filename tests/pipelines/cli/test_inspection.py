"""`orpo inspect`, `verify` and `lineage`."""

import json

import pytest

import orpo_data
from orpo_data.manifest import read_manifest

DATA_STAGES = ["ingest", "binarize", "clean", "split", "tokenize"]


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


def test_texts_that_a_terminal_would_obey_are_written_out(orpo, recipe_file, tmp_path):
    """In rows, in what decided on them, and in what is said of a file."""
    folder = tmp_path / "raw-pairs"
    folder.mkdir()
    rows = [{"prompt": "Q\x1b[2J?", "chosen": "\x1b]0;owned\x07", "rejected": f"No{i}.\r"} for i in (1, 1, 2)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "\x1b[8m"}\n')
    recipe = recipe_file(f"sources=[{{dataset: pairs, path: {folder}}}]")
    assert orpo("stage", "ingest", recipe, "-o", tmp_path / "i").code == 0
    told = [orpo("inspect", tmp_path / "i" / "pairs", "--rows", 3)]
    told += [orpo("lineage", tmp_path / "i" / "pairs", "--file", "p.jsonl", *line) for line in ([], ["--line", 4])]
    assert "Q\\x1b[2J?" in told[0].out
    for done in told:
        assert done.code == 0
        assert not set(done.out) & set("\x1b\x07\r")


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


def test_verify_of_a_sound_dataset(orpo, prepared):
    for stage in DATA_STAGES[1:]:
        done = orpo("verify", prepared / stage)
        assert (done.code, "sound" in done.out) == (0, True)
    assert json.loads(orpo("verify", prepared / "clean", "--json").out)["ok"] is True


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


def test_no_such_row(orpo, prepared):
    done = orpo("lineage", prepared / "tokenize", "--row", "zzz")
    assert done.code == 1
    assert done.err.startswith("orpo: no row with id 'zzz'")
