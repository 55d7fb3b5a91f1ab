"""The report: figures as in the manifest, nothing from data escapes, the same bytes every time, a bounded size."""

import gc
import re
import shutil
import weakref
from typing import Any

import pytest

from orpo_data import report as report_module
from orpo_data.manifest import read_manifest
from orpo_data.pages.measures import Measures, measure
from orpo_data.report import write_pages
from orpo_data.schema import JUDGED, PAIRS, RATED, TOKENIZED, pair_id

HOSTILE = (
    "</b><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='x' [a](javascript:alert(3)) `*_| {{ 7*7 }}"
    "</style></title></textarea><a href=javascript:alert(4)>x</a>"
)
ORIGIN = {"source": HOSTILE, "source_file": HOSTILE, "source_row": 3}


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def hostile_pair() -> dict[str, Any]:
    texts = {name: HOSTILE for name in PAIRS.names if PAIRS.field(name).type == PAIRS.field("id").type}
    messages = {name: message(HOSTILE, HOSTILE) for name in ("prompt", "chosen", "rejected")}
    flags = [{"rule": HOSTILE, "side": HOSTILE, "value": 0.5}]
    return {**texts, **messages, "score_chosen": 4.25, "source_row": 3, "flags": flags, "label_noise": 0.75}


def rated(text: str) -> dict[str, Any]:
    answer = {"model": text, "response": text, "system_prompt": text, "overall_score": 7.5, "honesty": None}
    origin = {"source": text, "source_file": text, "source_row": 1}
    return {"id": text, "prompt": message(text, text), "completions": [answer] * 3, "subset": text, **origin}


def tokenized(prompt: int, chosen: int, rejected: int, source: str = "hh", **values: Any) -> dict[str, Any]:
    lengths = {"chosen_input_ids": prompt + chosen, "rejected_input_ids": prompt + rejected}
    ids = {name: list(range(length)) for name, length in lengths.items()}
    marks = {"prompt_turns_dropped": 0, "chosen_truncated": True, "rejected_truncated": False}
    return {"id": "f" * 32, **ids, "prompt_len": prompt, "source": source, **marks, **values}


@pytest.fixture
def report(tmp_path, write_dataset, read_page):
    """Writes a dataset and reads its report."""

    def make(*args: Any, folder: str = "d", **values: Any) -> Any:
        write_dataset(tmp_path / folder, *args, **values)
        return read_page((tmp_path / folder / "report.html").read_text())

    return make


@pytest.mark.parametrize(
    ("schema", "row"),
    [(JUDGED, hostile_pair()), (RATED, rated(HOSTILE)), (TOKENIZED, tokenized(3, 4, 5, HOSTILE, id=HOSTILE))],
    ids=["pairs", "rated", "tokenized"],
)
def test_text_from_data_stays_text(tmp_path, report, loser, schema, row):
    losers = [loser("tie", HOSTILE, HOSTILE, **ORIGIN), loser("contaminated_ngram", HOSTILE, HOSTILE, **ORIGIN)]
    facts = {HOSTILE: [{HOSTILE: HOSTILE}, {HOSTILE: {HOSTILE: [HOSTILE]}}], "n": 3, "none": None, "list": []}
    page = report(schema, {None: [row]}, losers, name=HOSTILE, source=HOSTILE, facts=facts, flagged={HOSTILE: 1})
    page.assert_harmless()
    assert HOSTILE in page.text
    assert "49" not in page.text.replace("{{ 7*7 }}", "")  # data is no template
    html = (tmp_path / "d" / "report.html").read_text()
    assert html.lower().count("<script") == 1
    assert "url(" not in html.split("</style>")[0]
    assert "@import" not in html.split("</style>")[0]


def test_figures_are_the_manifests(report, plain_pair, loser):
    rows = {"train": [plain_pair(str(n)) for n in range(1200)], "eval": [plain_pair("e", source="other")] * 34}
    page = report(PAIRS, rows, [loser("tie")] * 5 + [loser("empty_turn")] * 2)
    assert "Rows 1,234 Rows read 1,241 Dropped 7" in page.words
    assert "clean 1,241 -5 tie 0.4 % -2 empty_turn 0.2 % kept 1,234 train 1,200, eval 34" in page.words
    assert "hh 1,200 0 1,200 other 0 34 34" in page.words
    assert "ab" * 32 in page.words
    assert "cd" * 32 in page.words


def test_same_data_same_bytes(tmp_path, write_dataset, plain_pair, loser):
    rows = {"train": [plain_pair(f"{n} " * n) for n in range(1, 30)], "eval": []}
    for name in ("one", "two"):
        write_dataset(tmp_path / name, PAIRS, rows, [loser("tie")])
    pages = [[(tmp_path / name / page).read_text() for page in ("report.html", "README.md")] for name in ("one", "two")]
    assert pages[0] == pages[1]
    assert str(tmp_path) not in "".join(pages[0])


def test_rows_in_another_order_show_the_same_samples(report, plain_pair):
    rows = [plain_pair(f"question {n}", id=f"{n * 7919 % 1000:032x}") for n in range(200)]
    first, second = (report(PAIRS, {None: part}, folder=name) for name, part in (("a", rows), ("b", rows[::-1])))
    assert first.words == second.words


def test_a_page_stays_small_whatever_the_rows(tmp_path, write_dataset, plain_pair, loser):
    long = "word " * 20_000
    rows = [plain_pair(long, (long, long), id=f"{n:032x}", source=f"source {n % 30}") for n in range(60)]
    losers = [loser(f"reason_{n % 30}", long, long) for n in range(90)]
    write_dataset(tmp_path / "d", PAIRS, {None: rows}, losers, facts={"clusters": [{"id": n} for n in range(5000)]})
    assert (tmp_path / "d" / "report.html").stat().st_size < 700_000


def test_the_figures_of_every_row_are_gone_when_the_pages_are_written(prepared, monkeypatch):
    """Not only after a full collection, which does not come as long as the stages run."""
    made: list[weakref.ref[Measures]] = []

    def noted(*args: Any) -> Measures:
        found = measure(*args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(report_module, "measure", noted)
    gc.disable()
    try:
        for stage in ("clean", "tokenize"):
            write_pages(prepared / stage, read_manifest(prepared / stage))
        assert [figures() for figures in made] == [None, None]
    finally:
        gc.enable()


def test_lengths_in_characters(report, plain_pair):
    rows = [plain_pair("ab", ("é" * 10, "x")), plain_pair("abcd", ("é" * 20, "xyz"))]
    rows[1]["prompt"] += message("assistant", "efgh")
    page = report(PAIRS, {None: rows})
    assert "prompt 5 8 8" in page.words  # of 2 and 8: median, 95 %, maximum
    assert "chosen 15 20 20 rejected 2 3 3" in page.words
    assert "The chosen answer is the longer one in 100.0 % of the rows" in page.words


def test_lengths_in_tokens_are_of_the_answer_alone(report):
    page = report(TOKENIZED, {"train": [tokenized(100, 7, 1009)], "eval": []})
    assert "chosen 7 7 7 rejected 1,009 1,009 1,009" in page.words
    assert "chosen · 7 tokens after a prompt of 100 cut at the limit" in page.words
    assert "0 1 2 3 … prompt | answer 100 101 102 103 104 105 106 …" in page.words
    assert "Tokens 1,216" in page.words
    assert "Answers cut at the length limit, without their end and end of turn: 1 chosen, 0 rejected." in page.words


def test_rated_answers_with_their_ratings(report):
    page = report(RATED, {None: [rated("ab")]})
    assert "ab · overall score 7.5 assistant ab" in page.words
    assert "· honesty" not in page.words
    assert "Model Answers ab 3" in page.words


def test_models_by_side(report, plain_pair):
    rows = [plain_pair("a", model_chosen="gpt-4", model_rejected="alpaca")] * 3
    rows.append(plain_pair("b", model_chosen="alpaca", model_rejected="gpt-4"))
    page = report(PAIRS, {None: rows})
    assert "Model Chosen Rejected Share chosen alpaca 1 3 25.0 % gpt-4 3 1 75.0 %" in page.words


def test_scores_are_drawn_for_each_source_in_its_own_unit(report, plain_pair):
    rows = [plain_pair("a", source="uf", score_chosen=5.0, score_rejected=3.5)] * 2
    rows += [plain_pair("b", source="other", score_chosen=-10.0, score_rejected=-40.0), plain_pair("c", source="none")]
    page = report(PAIRS, {None: rows})
    assert "Scores in uf, in the source's unit" in page.words
    assert "margin 1.50 1.50 1.50" in page.words
    assert "margin 30.00 30.00 30.00" in page.words
    assert "in none, in the source's unit" not in page.words
    assert "Only 3 of 4 rows have scores" in page.words


def test_flags_and_label_noise(report, plain_pair):
    flags = [
        {"rule": "refusal", "side": "chosen", "value": None},
        {"rule": "length_ratio", "side": "rejected", "value": 12.5},
    ]
    row = {"id": "1" * 32, "flags": flags, "label_noise": 0.875}
    rows = [plain_pair("odd", **row), plain_pair("plain", flags=[], label_noise=0.125)]
    page = report(JUDGED, {None: rows}, flagged={"refusal": 1, "length_ratio": 1})
    assert "Flagged 1 Size" in page.words
    assert "Kept with a flag: 1 of 2 rows (50.0 %): 1 length_ratio, 1 refusal" in page.words
    assert "refusal 1 An answer declines to help. In chosen 1. refusal · chosen length_ratio" in page.words
    assert "length_ratio · rejected 12.5" in page.words
    assert "label_noise is 0.5 or more in 1 of 2 scored rows (50.0 %)" in page.words
    assert "Labels most in doubt 2 of 2 rows odd hh" in page.words
    assert "label_noise 0.50 0.84 0.88" in page.words


def test_flagged_rows_of_every_split_are_found(report, plain_pair):
    flag = [{"rule": "refusal", "side": "chosen", "value": None}]
    sides = {"train": [plain_pair("plain", flags=[])] * 3, "eval": [plain_pair("odd", flags=flag, id="1" * 32)]}
    page = report(JUDGED, sides)
    assert f"In chosen 1. refusal · chosen {'1' * 32} hh, a.jsonl, line 4 user odd" in page.words


def test_what_a_step_found_is_shown_whatever_it_is(report, plain_pair):
    facts = {"clusters": 12, "largest": [{"kept": "abc", "size": 3}], "shares": {"uf": 0.25}, "empty": {}, "deep": True}
    page = report(PAIRS, {None: [plain_pair()]}, facts=facts)
    assert "found clusters 12 largest kept abc size 3 shares uf 0.25 empty none deep yes" in page.words


def test_an_empty_eval_split_and_nothing_dropped(tmp_path, report, plain_pair):
    page = report(PAIRS, {"train": [plain_pair()], "eval": []})
    assert "What this stage dropped" not in page.words
    assert "kept 1 train 1, eval 0" in page.words


def test_three_dropped_rows_a_reason_with_their_origin(report, plain_pair, loser):
    losers = [loser("tie", f'{{"prompt": [{{"role": "user", "content": "lost {n}"}}]}}') for n in range(5)]
    losers += [loser("unparsable", '{"chosen": "broken', "line 4")]
    page = report(PAIRS, {None: [plain_pair()]}, losers)
    assert page.words.count("user: lost") == 3
    assert "tie 5 Both answers have the same score." in page.words
    assert 'hh, a.jsonl, line 4 · dropped by clean line 4 record {"chosen": "broken' in page.words


def test_a_removed_row_stands_beside_the_one_it_is_like(report, plain_pair, loser):
    kept = plain_pair("the kept question", id="a1" * 16)
    row = '{"prompt": [{"role": "user", "content": "the dropped question"}]}'
    detail = f"of {'a1' * 16} (similarity 0.91)"
    page = report(PAIRS, {None: [kept]}, [loser("near_duplicate", row, detail, id="b2" * 16)])
    assert f"{detail} dropped prompt user: the dropped question the row it names prompt user: the kept question" in (
        page.words
    )


def test_contradicting_rows_that_both_fell_stand_beside_each_other(report, plain_pair, loser):
    row = '{"chosen": [{"role": "assistant", "content": "%s"}]}'
    first = loser("contradiction", row % "yes", f"against {'b' * 32}", id="a" * 32)
    second = loser("contradiction", row % "no", f"against {'a' * 32}", id="b" * 32)
    page = report(PAIRS, {None: [plain_pair()]}, [first, second])
    assert "dropped chosen assistant: yes the row it names chosen assistant: no" in page.words
    assert "dropped chosen assistant: no the row it names chosen assistant: yes" in page.words


def test_what_a_step_read_is_told_without_the_way_to_it(report, plain_pair):
    facts = {"evaluation_sets": [{"name": "mine", "path": "/home/me/questions.jsonl"}]}
    page = report(PAIRS, {None: [plain_pair()]}, facts=facts)
    assert "questions.jsonl" in page.words
    assert "/home/me" not in page.words


def test_models_beyond_those_shown_are_counted(report, plain_pair):
    page = report(PAIRS, {None: [plain_pair(str(n), model_chosen=f"m{n}", id=f"{n:032x}") for n in range(23)]})
    assert "3 more models, with fewer answers each." in page.words


def test_sources_beyond_those_shown_are_counted(report, plain_pair):
    page = report(PAIRS, {None: [plain_pair(str(n), source=f"s{n}", id=f"{n:032x}") for n in range(6)]})
    assert "Scores and margins of the 4 largest of 6 sources." in page.words


def test_labels_are_in_doubt_only_where_something_speaks_against_them(report, plain_pair):
    page = report(JUDGED, {None: [plain_pair(flags=[], label_noise=0.0)]})
    assert "Labels most in doubt" not in page.words


def test_every_contaminated_row_stands_beside_what_it_overlaps(report, plain_pair, loser):
    row = '{"prompt": [{"role": "user", "content": "question %d"}]}'
    losers = [loser("contaminated_exact", row % n, f"item {n}", source_row=n) for n in range(9)]
    page = report(PAIRS, {None: [plain_pair()]}, losers)
    assert "Removed rows beside what they overlap 9 of 9" in page.words
    for n in range(9):
        assert f"hh, a.jsonl, line {n + 1} user: question {n} item {n}" in page.words


# --- the chain of stages ---------------------------------------------------------------------------------------------


def test_the_way_from_the_raw_records(prepared, read_page):
    text = read_page((prepared / "tokenize" / "report.html").read_text()).words
    stages = ["ingest · hh-rlhf", "ingest · ultrafeedback", "sources together", "clean", "split", "tokenize this page"]
    places = [text.index(stage) for stage in stages]
    assert places == sorted(places)
    folders = ("ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize")
    manifests = [read_manifest(prepared / folder) for folder in folders]
    read, lost = manifests[0].rows_in + manifests[1].rows_in, [manifest.drop_reasons for manifest in manifests]
    assert f"Raw records {read} Dropped on the way {sum(sum(reasons.values()) for reasons in lost)}" in text
    for reason, count in [item for reasons in lost for item in reasons.items()]:
        assert f"-{count} {reason}" in text


@pytest.mark.parametrize(
    ("stage", "links"),
    [
        ("ingest/hh-rlhf", []),
        ("binarize", ["../ingest/hh-rlhf/report.html", "../ingest/ultrafeedback/report.html"]),
        (
            "split",
            [f"../{stage}/report.html" for stage in ("ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean")],
        ),
    ],
)
def test_links_lead_to_the_reports_of_earlier_stages(prepared, read_page, stage, links):
    page = read_page((prepared / stage / "report.html").read_text())
    assert [link for link in page.links if not link.startswith("#")] == links
    assert all((prepared / stage / link).is_file() for link in links)


def test_links_within_the_page_lead_somewhere(prepared):
    html = (prepared / "clean" / "report.html").read_text()
    inside = re.findall(r'href="#(\w+)"', html)
    assert inside
    assert set(inside) <= set(re.findall(r'id="(\w+)"', html))


def test_tokenized_rows_show_their_text(prepared, read_page):
    page = read_page((prepared / "tokenize" / "report.html").read_text())
    assert "Beside the token ids stands the text they were made of" in page.words
    assert re.search(r"chosen · \d+ tokens after a prompt of \d+ (cut at the limit )?assistant ", page.words)


@pytest.fixture
def alone(tmp_path, prepared, read_page):
    """The report of a stage whose earlier stages `change` did something to."""

    def make(stage: str, change: Any) -> Any:
        shutil.copytree(prepared, tmp_path / "run")
        change(tmp_path / "run")
        manifest = read_manifest(tmp_path / "run" / stage)
        write_pages(tmp_path / "run" / stage, manifest)
        return read_page((tmp_path / "run" / stage / "report.html").read_text())

    return make


def test_without_the_earlier_stages_there_is_the_stage_itself(alone, prepared):
    page = alone("clean", lambda run: shutil.rmtree(run / "binarize"))
    manifest = read_manifest(prepared / "clean")
    assert f"Rows {manifest.rows} Rows read {manifest.rows_in} Dropped" in page.words
    assert "ingest" not in page.words
    assert not [link for link in page.links if not link.startswith("#")]
    assert "Not looked for" not in page.words  # nobody knows what was done before


def test_a_stage_that_was_made_anew_since_is_no_part_of_the_chain(alone):
    def make_anew(run: Any) -> None:
        shutil.rmtree(run / "binarize")
        shutil.copytree(run / "clean", run / "binarize")

    page = alone("clean", make_anew)
    assert not [link for link in page.links if not link.startswith("#")]


def test_tokenized_rows_without_their_text(alone):
    page = alone("tokenize", lambda run: shutil.rmtree(run / "split"))
    assert "Beside the token ids" not in page.words
    assert "tokens after a prompt of" in page.words


def test_changed_rows_before_and_after(tmp_path, write_dataset, read_page, make_pair):
    from orpo_data.stage import dataset_input

    before = [make_pair("same"), make_pair("ask\u200b me", source_row=1), make_pair("twice", source_row=2)]
    before.append(make_pair("twin", source_row=2))  # two rows of one record: which became which, nobody can tell
    after = [before[0], make_pair("ask me", source_row=1), make_pair("thrice", source_row=2)]
    write_dataset(tmp_path / "before", PAIRS, {None: before}, stage="binarize")
    inputs = [dataset_input(tmp_path / "before", tmp_path / "after")]
    empty = {"flags": [], "label_noise": None}
    write_dataset(
        tmp_path / "after", JUDGED, {None: [row | empty for row in after]}, stage="clean", inputs=inputs, changed=1
    )
    text = read_page((tmp_path / "after" / "report.html").read_text()).words
    assert f"{before[1]['id']} became {after[1]['id']} prompt before user: ask <U+200B> me after user: ask me" in text
    assert "thrice became" not in text
    assert text.count("became") == 1
    assert pair_id(after[1]["prompt"], after[1]["chosen"], after[1]["rejected"]) == after[1]["id"]
