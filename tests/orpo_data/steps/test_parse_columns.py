"""Parsing by columns and one by one: the same rows, ids, reasons and bytes for whatever a file holds."""

import json
import time
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.schema import ASPECTS, RAW
from orpo_data.sources import SOURCES
from orpo_data.sources.files import find_files, read_records
from orpo_data.sources.hh_rlhf import LABEL, MARKS
from orpo_data.steps import parse
from orpo_data.steps.parse import Parse

REAL = Path(__file__).parents[4] / "shared" / "data"


def raw(*records: Any) -> pa.Table:
    """Records given as JSON text or as values."""
    texts = [record if isinstance(record, str) else orjson.dumps(record).decode() for record in records]
    columns = [["mine"] * len(texts), ["a.jsonl"] * len(texts), [*range(len(texts))], texts]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, RAW, strict=True)], schema=RAW)


def stored(table: pa.Table) -> bytes:
    """The rows as a shard would hold them."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.take(pa.array(range(len(table)), pa.int64())).combine_chunks())
    return sink.getvalue().to_pybytes()


def assert_same(step: Parse, table: pa.Table, few: int = parse.FEW) -> None:
    """Columns give the rows of the definition; with `few` at 1, each record has its chance whatever is beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parse, "FEW", few)
        output, (expected, _) = step.apply(table), step._one_by_one(table)
    assert output.kept.to_pylist() == expected.kept.to_pylist()  # said first: it shows where they differ
    assert stored(output.kept) == stored(expected.kept)
    assert stored(output.dropped) == stored(expected.dropped)
    assert output.changed == expected.changed


def odd(step: Parse, *records: Any) -> list[int]:
    """Places of the records that are parsed one by one."""
    return step._by_columns(raw(*records))[1].tolist()


# --- hh-rlhf ---------------------------------------------------------------------------------------------------------

HH = Parse(dataset="hh-rlhf")
ORDINARY = {
    "chosen": "\n\nHuman: caf\u00e9\n\nmore \n\nAssistant: a\n\nHuman: b\n\nAssistant: \U0001f469 \t",
    "rejected": "\n\nHuman: caf\u00e9\n\nmore \n\nAssistant: a\n\nHuman: b\n\nAssistant:",
}


@pytest.mark.parametrize(
    "record",
    [
        ORDINARY,
        ORDINARY | {"id": 7, "more": {"chosen": [None]}},
        {"chosen": "\n\nHum: a\n\r\nAssistant: b\r\n\r\nHuman: c", "rejected": "\n\nAssistant: x"},
        json.dumps(ORDINARY, indent=1),
        '{"chosen": "\\n\\nHuman: old", "rejected": "\\n\\nHuman: \\ud83d\\ude00", "chosen": "\\n\\nHuman: new"}',
    ],
)
def test_an_ordinary_transcript_is_parsed_by_columns(record):
    assert odd(HH, record) == []
    assert_same(HH, raw(record))


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": "Human: at the very beginning", "rejected": "\n\nHuman: q"},
        {"chosen": "\nHuman: after one newline", "rejected": "\n\nHuman: q"},
        {"chosen": "\n\nHuman: a \x1eu mark", "rejected": "\n\nHuman: q"},
        {"chosen": "no label", "rejected": "\n\nHuman: q"},
        {"chosen": "\n\nHuman: q", "rejected": 1},
        '{"chosen": "\\n\\nHuman: \\ud83d", "rejected": "\\n\\nHuman: q"}',
        "[]",
        "",
    ],
)
def test_an_odd_transcript_costs_few_others(record):
    table = raw(*[ORDINARY] * 50, record, *[ORDINARY] * 50)
    places = HH._by_columns(table)[1].tolist()
    assert len(places) <= parse.FEW
    assert_same(HH, table)


def test_labels_are_spelled_out():
    assert all(LABEL.fullmatch(label) for label in MARKS)
    assert len(MARKS) == 6
    assert not any(b in a[1:] + b[:1] and a != b for a in MARKS for b in MARKS if a[1:].startswith(b[:1] + b[1:2]))


PIECES = ["\n\nHuman:", "\n\nAssistant: ", "\n\nHum:", "\n\r\nHuman: ", "Human:", "\n", "\r", "\x1e", "\x1eu", "\x1c"]
PIECES += [" ", "\u00a0", "\u2028", "\u200b", "\x85", "\x00", "a", "é", "😀", '"', "\\", "Assistant:"]
TRANSCRIPT = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
BEGUN = TRANSCRIPT.map("\n\nHuman: a".__add__)
VALUE = st.sampled_from([None, True, 0, -0.0, 1.5, 10**19, [], {}, "", "x", ["x"], {"x": 1}])


@given(st.lists(st.tuples(TRANSCRIPT | BEGUN, TRANSCRIPT | BEGUN), max_size=8), st.booleans())
def test_any_transcripts(pairs, cut):
    history = "\n\nHuman: q\n\nAssistant: a"
    records = [{"chosen": history + a, "rejected": history + b} for a, b in pairs]
    records += [{"chosen": a, "rejected": b} for a, b in pairs]
    assert_same(Parse(dataset="hh-rlhf", diverges="keep-common-prefix" if cut else "drop"), raw(*records), few=1)


@pytest.mark.parametrize("text", ["x" * 10_000_000, "\n\nHuman: a" * 500_000, "é\r\n\r\n" * 1_000_000])
def test_huge_transcripts_by_columns_take_time_in_proportion(text):
    started = time.monotonic()
    (row,) = HH.apply(
        raw({"chosen": f"\n\nHuman: q{text}\n\nAssistant: a", "rejected": "\n\nHuman: q"})
    ).kept.to_pylist()
    assert row["chosen"][-1] == {"role": "assistant", "content": "a"}
    assert time.monotonic() - started < 20  # about a second; hours if it were quadratic


# --- ultrafeedback ---------------------------------------------------------------------------------------------------

ANSWER = {
    "model": "alpaca-7b",
    "response": "Paris.",
    "custom_system_prompt": "Be helpful.",
    "critique": "short",
    "overall_score": 7.5,
    "annotations": {
        "instruction_following": {"Rating": "4", "Rationale": "good"},
        "honesty": {"Rating": "N/A"},
        "truthfulness": {"Type": ["1"], "Rating": "5"},
        "helpfulness": {"Rationale": "no rating given"},
    },
}
LISTS = ANSWER | {"annotations": {aspect: [{"Rating": str(i)}] for i, aspect in enumerate(ASPECTS, 1)}}
UF = Parse(dataset="ultrafeedback")


def rated(*answers: Any, **changes: Any) -> dict[str, Any]:
    return {"source": "flan", "instruction": "Capital?", "models": [], "completions": list(answers)} | changes


@pytest.mark.parametrize(
    "record",
    [
        rated(ANSWER, ANSWER | {"model": None, "overall_score": "8"}, LISTS),
        rated(),
        {"instruction": "q", "completions": [{"response": ""}]},
        rated(ANSWER | {"annotations": None, "overall_score": 10, "custom_system_prompt": None}),
    ],
)
def test_an_ordinary_rated_prompt_is_parsed_by_columns(record):
    assert odd(UF, record) == []
    assert_same(UF, raw(record))


MARK = st.sampled_from(["1", "5", "6", "0.0", "-0", " 4\n", "n/a", "", "x", "nan", "1e39", 3, 4.5, 0, -0.0, 5.000001])
ASPECT = st.one_of(
    st.fixed_dictionaries({"Rating": MARK | VALUE}),
    st.lists(st.fixed_dictionaries({"Rating": MARK}), max_size=2),
    st.fixed_dictionaries({"Rating": st.sampled_from("12345")}),
    VALUE,
)
HOSTILE_ANSWER = st.one_of(
    st.just(ANSWER),
    st.tuples(st.sampled_from([*ANSWER]), VALUE).map(lambda change: ANSWER | dict([change])),
    st.fixed_dictionaries(
        {"response": st.text(max_size=3), "annotations": st.dictionaries(st.sampled_from(ASPECTS), ASPECT)},
        optional={"overall_score": MARK | VALUE},
    ),
    VALUE,
)
HOSTILE_RATED = st.one_of(
    st.lists(HOSTILE_ANSWER, max_size=3).map(lambda answers: rated(*answers)),
    st.tuples(st.sampled_from(["source", "instruction", "completions"]), VALUE).map(
        lambda change: rated(ANSWER, **dict([change]))
    ),
    VALUE,
)


@given(st.lists(HOSTILE_RATED, max_size=12))
@example([rated(ANSWER | {"overall_score": True})])
@example([rated(ANSWER | {"overall_score": ["x"]})])
@example([rated(ANSWER | {"overall_score": {"x": 1}})])
@example([rated(ANSWER | {"overall_score": 0}), rated(ANSWER | {"overall_score": -0.0})])
@example([rated(ANSWER | {"annotations": []})])
@example([rated(ANSWER, completions="")])
def test_any_rated_prompts(records):
    assert_same(UF, raw(*records), few=1)


# --- pairs -----------------------------------------------------------------------------------------------------------

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
PAIRS_OF_ANYONE = Parse(dataset="pairs")


def said(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


FORMS = {
    "strings": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "scores": {"prompt": "q", "chosen": "a", "rejected": "b", "metadata": {"score_chosen": 2, "score_rejected": 1.5}},
    "implicit prompt": {"chosen": [Q, A], "rejected": [Q, B]},
    "prompt twice": {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "chosen_score": 4, "rejected-rating": None},
    "explicit prompt": {"prompt": [{"role": "system", "content": "s"}, Q], "chosen": [A], "rejected": [B]},
    "single messages": {"prompt": "q", "chosen": A, "rejected": B, "chosen-model": "m"},
    "ShareGPT": {"conversations": [said("human", "q")], "chosen": said("GPT", "a"), "rejected": said("gpt", "b")},
    "system": {"prompt": "q", "system": "s", "chosen": "a", "rejected": "b", "subset": "x"},
    "nothing shared": {"prompt": None, "chosen": [Q], "rejected": [Q | {"content": "r"}]},
    "own system": {"prompt": [{"role": "system", "content": "own"}], "system": "s", "chosen": [A], "rejected": [B]},
    "no system": {"prompt": "q", "system": "", "chosen": "a", "rejected": "b"},
    "scores of 0": {"prompt": "", "chosen": "a", "rejected": "", "chosen-rating": 0, "rejected_score": 0.0},
    "diverging": {"chosen": [Q, A, Q, B], "rejected": [Q, B, Q, A]},
}


@pytest.mark.parametrize("form", FORMS)
def test_an_ordinary_pair_is_parsed_by_columns(form):
    several = [FORMS[form]] * 40
    assert odd(PAIRS_OF_ANYONE, *several) == []
    assert_same(PAIRS_OF_ANYONE, raw(*several))


MESSAGE = st.one_of(
    st.sampled_from([Q, A, B, {"role": "System", "content": "s"}, said("human", "q"), said("gpt", "a")]),
    st.sampled_from([Q | said("human", "q"), {"role": None} | said("human", "q"), {"role": "nobody", "content": ""}]),
    st.sampled_from([{"role": "user"}, {"content": "c"}, said("bard", "") | {"value": 1}]),
)
PAIR_COLUMNS = ["metadata", *(name for names in SOURCES["pairs"].columns.values() for name in names)]
TURNS = st.text(max_size=3) | MESSAGE | st.lists(MESSAGE, max_size=3) | VALUE | st.lists(VALUE, max_size=2)
HOSTILE_PAIR = st.one_of(
    st.sampled_from([*FORMS.values()]),
    st.fixed_dictionaries(
        {"chosen": TURNS, "rejected": TURNS},
        optional={
            "prompt": TURNS,
            "conversations": TURNS,
            "system": st.sampled_from(["s", "", None, 1]),
            "score_chosen": VALUE | st.floats(allow_nan=False, width=64) | st.integers(-(2**63), 2**64 - 1),
            "chosen-rating": VALUE,
            "metadata": VALUE | st.fixed_dictionaries({"score_chosen": VALUE}),
            "metadata.score_chosen": VALUE,
            "model_rejected": VALUE,
        },
    ),
    st.tuples(st.sampled_from([*FORMS.values()]), st.sampled_from(PAIR_COLUMNS), VALUE).map(
        lambda change: change[0] | {change[1]: change[2]}
    ),
)
COLUMNS = st.sampled_from([{}, {"prompt": "metadata.score_chosen"}, {"score_chosen": "score"}, {"chosen": "rejected"}])


SCORED = [FORMS["strings"] | scores for scores in ({"chosen-rating": 5}, {"score_chosen": 0, "chosen-rating": 5})]


@given(st.lists(HOSTILE_PAIR, max_size=12), COLUMNS, st.booleans())
@example(SCORED, {}, False)
@example([FORMS["strings"] | {"score_chosen": -1e39}], {}, False)
def test_any_pairs(records, columns, cut):
    diverges = "keep-common-prefix" if cut else "drop"
    assert_same(Parse(dataset="pairs", columns=columns, diverges=diverges), raw(*records), few=1)


# --- records that are not JSON, and many -----------------------------------------------------------------------------

LINES = [
    orjson.dumps(ORDINARY).decode(),
    orjson.dumps(rated(ANSWER)).decode(),
    *(orjson.dumps(record).decode() for record in FORMS.values()),
    '{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": NaN}',
    '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
    '{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "last"}',
    '{"prompt": "q", "chosen": "a", "rejected": "b", "x": 1e999}',
    '{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": -1e39}',
    '{"a": 1}, {"b": 2}',
    "[" * 2000,
    "[1",
    "2]",
    "",
    "null",
]


@given(st.sampled_from(["pairs", "hh-rlhf", "ultrafeedback"]), st.lists(st.sampled_from(LINES), max_size=80))
def test_any_lines(dataset, lines):
    assert_same(Parse(dataset=dataset), raw(*lines))
    assert_same(Parse(dataset=dataset), raw(*lines), few=1)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data of ../shared/data is not here")
@pytest.mark.parametrize(
    ("path", "dataset", "one_by_one"),
    [
        ("hh_rlhf/harmless-base", "hh-rlhf", 0),
        ("hh_rlhf/helpful-base", "hh-rlhf", 0),
        ("hh_rlhf/helpful-online", "hh-rlhf", 0),
        ("hh_rlhf/helpful-rejection-sampled", "hh-rlhf", 0),
        ("ultrafeedback_binarized", "pairs", 0),
        ("pairs", "pairs", 0),
    ],
)
def test_real_rows(path, dataset, one_by_one):
    step = Parse(dataset=dataset)
    for file in find_files(str(REAL / path)):
        for table in read_records(file, "real"):
            assert_same(step, table)
            assert len(step._by_columns(table)[1]) <= one_by_one
