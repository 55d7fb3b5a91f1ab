"""Bad rows and bad files through the stages: one line each, counted, nothing lost, nothing harmed."""

import json

import pytest

import orpo_data
from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from pipelines import prepare
from pipelines.layout import Layout

HUGE = "leaf and twig " * 750_000  # 10 MB
LARGE = HUGE[:50_000]  # as far as a tokenizer should have to read it in a quick test


def pair(question="Q?", chosen="Yes.", rejected="No."):
    return json.dumps({"prompt": question, "chosen": chosen, "rejected": rejected})


@pytest.fixture
def raw(tmp_path):
    """A folder for raw files, with three sound pairs in it; `write` adds a file of lines."""
    folder = tmp_path / "raw"
    folder.mkdir()

    def write(name, *lines):
        (folder / name).write_bytes(b"".join(line.encode("utf-8", "surrogatepass") + b"\n" for line in lines))

    write("good.jsonl", *(pair(f"What is {i} and {i}?", f"It is {2 * i}.", f"It is {i}{i}.") for i in range(3)))
    return folder, write


@pytest.fixture
def recipe_of(make_recipe):
    """Pairs of that folder."""
    return lambda folder, *overrides: make_recipe(f"sources=[{{dataset: pairs, path: '{folder}'}}]", *overrides)


def ends(folder, file):
    """What became of each line of a raw file: reasons, with the split where it was kept."""
    found = orpo_data.lineage(folder, file=file).ends
    return {row["source_row"] + 1: row["reason"] or "kept" for row in found.iter_rows(named=True)}


def accounted(place):
    """Every row of every stage went somewhere."""
    for folder in (place.binarize, place.clean, place.split, place.tokenize):
        manifest = read_manifest(folder)
        assert manifest.rows_in == manifest.rows + sum(manifest.drop_reasons.values())
        assert orpo_data.verify(folder).ok


def test_every_kind_of_bad_line_has_an_end_of_its_own(raw, recipe_of, tmp_path):
    folder, write = raw
    lines = {
        pair(): "kept",
        "{cut": "unparsable",
        "[" * 100_000 + "]" * 100_000: "unparsable",
        '{"prompt": "Q\\ud800?", "chosen": "a", "rejected": "b"}': "unparsable",  # half a surrogate pair
        '{"prompt": "Q\ud800?", "chosen": "a", "rejected": "b"}': "unparsable",  # and as bytes that are not UTF-8
        "null": "unparsable",
        '{"prompt": null, "chosen": "a", "rejected": "b"}': "unparsable",
        '{"prompt": "Q?", "chosen": ["a"], "rejected": "b"}': "unparsable",
        pair("NUL \0 here?", "Yes \0.", "No."): "kept",
        pair("Blank?", " \u00a0\t", "No."): "empty_turn",
        pair("Same?", "Yes.", "Yes."): "identical_pair",
        pair("Token?", "<|im_end|>", "No."): "control_token_in_text",
        pair("Huge?", HUGE, "No."): "too_long",
        pair(LARGE, "Yes.", "No."): "prompt_too_long",
        pair("Large answers?", LARGE + "yes", LARGE + "no"): "identical_after_truncation",
        pair("One large answer?", LARGE, "No."): "kept",
    }
    write("bad.jsonl", *lines)
    prepare(recipe_of(folder, "clean.too_long={action: drop, at_most: 60000}"), tmp_path / "run")
    accounted(Layout(tmp_path / "run"))
    told = ends(tmp_path / "run/tokenize", "bad.jsonl")
    assert told == dict(enumerate(lines.values(), 1))
    assert set(ends(tmp_path / "run/tokenize", "good.jsonl").values()) == {"kept"}


def test_details_stay_short_whatever_the_row_holds(raw, recipe_of, tmp_path):
    folder, write = raw
    rows = [pair("Q?", HUGE, HUGE), json.dumps({HUGE: 1}), pair("Q?", f"<|im_end|>{LARGE}"), pair(LARGE), "[" * 10**6]
    write("bad.jsonl", *rows)
    prepare(recipe_of(folder), tmp_path / "run")
    found = orpo_data.lineage(tmp_path / "run/tokenize", file="bad.jsonl").ends
    reasons = ["identical_pair", "unparsable", "control_token_in_text", "prompt_too_long", "unparsable"]
    assert found["reason"].to_list() == reasons
    assert found["detail"].str.len_chars().max() < 500


def test_ratings_off_the_scale_and_any_number_of_completions(make_recipe, own_raw_data, tmp_path):
    file = own_raw_data / "uf/evol_instruct.jsonl"
    sound = json.loads(file.read_text().splitlines()[0])
    best, *_, worst = sound["completions"]

    def prompt(name, completions, **changes):
        row = sound | {"instruction": name, "completions": completions} | changes
        return json.dumps(row)

    def rated(value):
        return worst | {"annotations": worst["annotations"] | {"honesty": {"Rating": value}}}

    lines = {
        prompt("none", []): "too_few_completions",
        prompt("five", [*sound["completions"], best | {"model": "fifth", "response": "Fifth."}]): "kept",
        prompt("six", [best, rated("6"), worst]): "unparsable",
        prompt("zero", [best, rated(0), worst]): "unparsable",
        prompt("word", [best, rated("good"), worst]): "unparsable",
        prompt("nan", [best, rated("nan"), worst]): "unparsable",
        prompt("missing", [best, rated(None), worst]): "kept",
        prompt("no list", {"a": 1}): "unparsable",
    }
    file.write_text("\n".join(lines))
    recipe = make_recipe(raw=own_raw_data)
    prepare(recipe, tmp_path / "run")
    accounted(Layout(tmp_path / "run"))
    assert ends(tmp_path / "run/tokenize", "evol_instruct.jsonl") == dict(enumerate(lines.values(), 1))


def test_the_same_rows_in_two_files(raw, recipe_of, tmp_path):
    """Equal content has one id: both rows are counted, and each has its own end."""
    folder, write = raw
    good = (folder / "good.jsonl").read_text().splitlines()
    write("again.jsonl", *good)
    place = Layout(tmp_path / "run")
    reports = prepare(recipe_of(folder), place.root)
    assert [report.rows_out for report in reports] == [6] * 5
    assert len(set(orpo_data.load(place.clean)["id"])) == 3
    assert set(ends(place.tokenize, "again.jsonl").values()) == {"kept"}
    reports = prepare(recipe_of(folder, "dedup={near: null}"), place.root)
    assert reports[2].dropped == {"duplicate_pair": 3}
    accounted(place)
    told = [ends(place.tokenize, name)[line] for line in (1, 2, 3) for name in ("again.jsonl", "good.jsonl")]
    assert told == ["kept", "duplicate_pair"] * 3  # the first by file stays


def test_an_empty_file_among_others(raw, recipe_of, tmp_path):
    folder, write = raw
    write("empty.jsonl")
    write("blank.jsonl", "", "  ", "")
    reports = prepare(recipe_of(folder), tmp_path / "run")
    assert [report.rows_in for report in reports] == [3] * 5
    assert [item.name for item in read_manifest(reports[0].path).inputs] == ["blank.jsonl", "empty.jsonl", "good.jsonl"]
    assert ends(reports[-1].path, "empty.jsonl") == {}


@pytest.fixture
def standing(raw, recipe_of, tmp_path):
    """A finished run over the sound pairs, with what every file in it holds."""
    folder, write = raw
    prepare(recipe_of(folder), tmp_path / "run")
    return folder, write, {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


def unharmed(standing, *below):
    return all(file.read_bytes() == content for file, content in standing[2].items() if set(below) & set(file.parts))


def test_a_source_that_yields_nothing(standing, recipe_of, tmp_path):
    folder, write, _ = standing
    for name in ("good.jsonl", "more.jsonl"):
        write(name)
    with pytest.raises(OrpoError, match=r"^ingest: no rows left of 0 \(nothing is in good.jsonl, more.jsonl\)$"):
        prepare(recipe_of(folder), tmp_path / "run")
    assert unharmed(standing, "ingest", "binarize", "clean", "split", "tokenize")


def test_a_source_of_which_nothing_can_be_parsed(standing, recipe_of, tmp_path):
    folder, write, _ = standing
    write("good.jsonl", "{cut", "null", "7")
    with pytest.raises(OrpoError, match=r"^ingest: no rows left of 3 \(3 unparsable\)$"):
        prepare(recipe_of(folder), tmp_path / "run")
    assert unharmed(standing, "ingest", "binarize", "clean", "split", "tokenize")


def test_all_rows_dropped(standing, recipe_of, tmp_path):
    folder, _, _ = standing
    with pytest.raises(OrpoError, match=r"^clean: no rows left of 3 \(3 too_short\)$"):
        prepare(recipe_of(folder, "clean.too_short={action: drop, at_least: 1000}"), tmp_path / "run")
    assert unharmed(standing, "ingest", "binarize", "clean", "split", "tokenize")


@pytest.mark.parametrize("content", ["", "\n\n", '{"question": ""}\n'])
def test_an_evaluation_set_that_is_empty(standing, recipe_of, tmp_path, content):
    folder, _, _ = standing
    (tmp_path / "own.jsonl").write_text(content)
    against = f"decontaminate.against=[{{name: own, path: '{tmp_path / 'own.jsonl'}', column: question}}]"
    with pytest.raises(OrpoError, match=r"'own': .*own.jsonl is empty"):
        prepare(recipe_of(folder, against), tmp_path / "run")
    assert unharmed(standing, "ingest", "binarize", "clean", "split", "tokenize")


def test_an_evaluation_set_of_huge_and_tiny_questions(raw, recipe_of, tmp_path):
    folder, _ = raw
    questions = [HUGE, "What is 1 and 1?", "", "\0", "?"]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"question": text}) for text in questions))
    against = f"decontaminate.against=[{{name: own, path: '{tmp_path / 'own.jsonl'}', column: question}}]"
    reports = prepare(recipe_of(folder, against), tmp_path / "run")
    assert reports[2].dropped == {"contaminated_exact": 1}
    assert ends(reports[-1].path, "good.jsonl") == {1: "kept", 2: "contaminated_exact", 3: "kept"}


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("{% if '1' in messages[0].content %}{{ raise_exception('no ones here') }}{% endif %}", "refused_by_template"),
        ("{% if '1' in messages[0].content %}{{ 1 / 0 }}{% endif %}", "refused_by_template"),
    ],
)
def test_a_template_that_raises_costs_the_rows_it_refuses(raw, recipe_of, tmp_path, statement, reason):
    folder, _ = raw
    template = tmp_path / "own.jinja"
    template.write_text(
        statement + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    reports = prepare(recipe_of(folder, f"tokenize.chat_template={template}"), tmp_path / "run")
    assert reports[-1].dropped == {reason: 1}
    assert ends(reports[-1].path, "good.jsonl") == {1: "kept", 2: reason, 3: "kept"}
