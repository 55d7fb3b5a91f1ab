"""The data part as a whole: three formats in, one tokenized dataset out, and no stage run without need."""

import json

import pytest

import orpo_data
from orpo_data.errors import UsageError
from orpo_data.manifest import read_manifest
from pipelines import prepare
from pipelines.layout import Layout
from pipelines.preparation import run_one
from pipelines.recipe import Recipe

STAGES = ["ingest", "ingest", "ingest", "binarize", "clean", "split", "tokenize"]


@pytest.fixture
def three_formats(own_raw_data, make_recipe):
    """A recipe over HH-RLHF, UltraFeedback and ShareGPT-style pairs of this test's own."""

    def sharegpt(i: int) -> dict[str, object]:
        return {
            "conversations": [{"from": "human", "value": f"Name river number {i}."}],
            "chosen": {"from": "gpt", "value": f"The Elbe, river {i}."},
            "rejected": {"from": "gpt", "value": f"A lake, {i}."},
        }

    (own_raw_data / "pairs.json").write_text(json.dumps([sharegpt(i) for i in range(12)]))

    def make(*overrides: str) -> Recipe:
        document = make_recipe(raw=own_raw_data).resolved()
        document["sources"].append({"dataset": "pairs", "path": str(own_raw_data / "pairs.json")})
        from pipelines.documents import apply_override

        for override in overrides:
            apply_override(document, override)
        return Recipe.parse(document)

    return make


def test_three_formats_end_in_one_tokenized_dataset(three_formats, tmp_path):
    reports = prepare(three_formats(), tmp_path / "run")
    assert [report.stage for report in reports] == STAGES
    assert [report.rows_out for report in reports[:3]] == [47, 23, 12]
    assert reports[0].dropped == {"unparsable": 1}
    assert [report.rows_in for report in reports[3:]] == [82, *(report.rows_out for report in reports[3:-1])]
    assert reports[3].dropped == {"rating_missing": 1, "tie": 1, "too_few_completions": 1}
    assert set(reports[4].dropped) == {
        "diverges_early", "empty_turn", "ends_with_human", "identical_pair", "not_alternating"
    }  # fmt: skip
    for report in reports:
        assert report.rows_in == report.rows_out + sum(report.dropped.values())
        assert orpo_data.verify(report.path).ok
    tokens = [orpo_data.load(reports[-1].path, split=split).to_list() for split in ("train", "eval")]
    assert {row["source"] for side in tokens for row in side} == {"hh-rlhf", "ultrafeedback", "pairs"}
    for row in (row for side in tokens for row in side):
        prompt = row["prompt_len"]
        assert row["chosen_input_ids"][:prompt] == row["rejected_input_ids"][:prompt]
        assert min(len(row["chosen_input_ids"]), len(row["rejected_input_ids"])) > prompt


def test_second_run_runs_nothing(three_formats, tmp_path, snapshot):
    first = prepare(three_formats(), tmp_path / "run")
    assert all(report.ran for report in first)
    before = snapshot(tmp_path / "run")
    second = prepare(three_formats(), tmp_path / "run")
    assert [(report.ran, report.why) for report in second] == [(False, "unchanged")] * len(STAGES)
    assert [report.content_hash for report in second] == [report.content_hash for report in first]
    assert snapshot(tmp_path / "run") == before
    assert sum(report.seconds for report in second) < 1


@pytest.mark.parametrize(
    ("override", "reruns", "why"),
    [
        ("name=other", [], ""),
        ("train={model: other}", [], ""),
        ("evaluate.samples=1", [], ""),
        ("sources.2.weight=0.5", [3, 4, 5, 6], "weight"),
        ("binarize.strategy=overall-score", [3, 4, 5, 6], "strategy: mean-rating -> overall-score"),
        ("split.seed=7", [5, 6], "seed: 42 -> 7"),
        ("tokenize.max_length=150", [6], "max_length: 160 -> 150"),
        ("tokenize.overlong_prompt=drop", [6], "overlong_prompt: drop-turns -> drop"),
    ],
)
def test_a_change_reruns_only_what_depends_on_it(three_formats, tmp_path, override, reruns, why):
    prepare(three_formats(), tmp_path / "run")
    reports = prepare(three_formats(override), tmp_path / "run")
    assert [index for index, report in enumerate(reports) if report.ran] == reruns
    if reruns and why != "weight":
        assert why in reports[reruns[0]].why
    assert all(report.why.startswith("changed: ") for report in reports if report.ran)


def test_changed_content_reruns_its_source_and_what_follows(three_formats, own_raw_data, tmp_path):
    prepare(three_formats(), tmp_path / "run")
    file = own_raw_data / "uf" / "evol_instruct.jsonl"
    content = file.read_text()
    file.write_text(content)  # a new time is no new content
    assert not any(report.ran for report in prepare(three_formats(), tmp_path / "run"))
    file.write_text("".join(content.splitlines(keepends=True)[:-4]))
    ran = [report.ran for report in prepare(three_formats(), tmp_path / "run")]
    assert ran == [False, True, False, True, True, True, True]


def test_an_undone_change_gives_the_same_bytes(three_formats, tmp_path, snapshot):
    def shards() -> dict[str, str]:
        return {name: digest for name, digest in snapshot(tmp_path / "run").items() if name.endswith(".arrow")}

    prepare(three_formats(), tmp_path / "run")
    before = shards()
    prepare(three_formats("split.seed=7"), tmp_path / "run")
    assert shards() != before
    prepare(three_formats(), tmp_path / "run")
    assert shards() == before


def test_deleted_or_cut_output_is_made_again(three_formats, tmp_path):
    reports = prepare(three_formats(), tmp_path / "run")
    shard = next(Layout(tmp_path / "run").clean.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:100])
    again = prepare(three_formats(), tmp_path / "run")
    assert [report.stage for report in again if report.ran] == ["clean"]
    assert again[4].content_hash == reports[4].content_hash


def test_progress_counts_the_rows_of_each_stage(three_formats, tmp_path):
    seen: dict[str, int] = {}
    reports = prepare(three_formats(), tmp_path / "run", seen.__setitem__)
    assert list(seen) == ["ingest", "binarize", "clean", "split", "tokenize"]
    assert [seen[report.stage] for report in reports[2:]] == [report.rows_in for report in reports[2:]]


def test_one_stage_reads_where_a_run_has_its_input(three_formats, tmp_path):
    recipe = three_formats()
    for name in ("ingest", "binarize", "clean"):
        reports = run_one(name, recipe, tmp_path, None, None)
    assert reports[0].path == tmp_path / "clean"
    (elsewhere,) = run_one("clean", recipe, tmp_path / "nothing", tmp_path / "binarize", tmp_path / "x")
    assert elsewhere.content_hash == reports[0].content_hash
    assert read_manifest(tmp_path / "x").rows == reports[0].rows_out


def test_a_cluster_takes_the_flow(three_formats, tmp_path):
    with pytest.raises(UsageError, match=r"^runner\.kind: dask takes the Prefect flow: `orpo run`"):
        prepare(three_formats("runner.kind=dask"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
