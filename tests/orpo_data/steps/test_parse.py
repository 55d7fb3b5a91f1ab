"""The parse step: every record becomes a row or a dropped row that says why."""

import gzip
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orpo_data.schema import DROPPED, PAIRS, RATED, RAW, pair_id
from orpo_data.sources.files import NOT_UTF8
from orpo_data.steps.parse import Parse

REAL = Path(__file__).parents[4] / "shared" / "data" / "hh_rlhf"
GOOD = '{"prompt": "q", "chosen": "yes", "rejected": "no", "score_chosen": 2}'


def raw(*records: str) -> pa.Table:
    count = len(records)
    columns = [["mine"] * count, ["a.jsonl"] * count, [10 + i for i in range(count)], list(records)]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, RAW, strict=True)], schema=RAW)


def test_pairs_row_by_hand():
    output = Parse(dataset="pairs").apply(raw(GOOD))
    assert output.kept.schema == PAIRS
    assert output.dropped.schema == DROPPED
    assert len(output.dropped) == 0
    messages = [[{"role": role, "content": text}] for role, text in (("user", "q"), ("assistant", "yes"))]
    messages.append([{"role": "assistant", "content": "no"}])
    assert output.kept.to_pylist() == [
        dict.fromkeys(PAIRS.names)
        | dict(zip(("prompt", "chosen", "rejected"), messages, strict=True))
        | {"id": pair_id(*messages), "score_chosen": 2.0}
        | {"source": "mine", "source_file": "a.jsonl", "source_row": 10}
    ]


def test_rated_row_by_hand():
    record = {"instruction": "q", "source": "flan", "completions": [{"response": "a", "overall_score": 8}]}
    output = Parse(dataset="ultrafeedback").apply(raw(orjson.dumps(record).decode()))
    assert output.kept.schema == RATED
    (row,) = output.kept.to_pylist()
    assert (row["prompt"], row["subset"]) == ([{"role": "user", "content": "q"}], "flan")
    assert (row["completions"][0]["response"], row["completions"][0]["overall_score"]) == ("a", 8.0)
    assert len(row["id"]) == 32


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ('{"prompt": "q", "chosen": ', "line 11, column 27: "),
        ("", "line 11, column 1: "),
        (NOT_UTF8 + '{"prompt": "\\xff"}', "line 11: not UTF-8"),
        ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "line 11, column 13: no low surrogate"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": NaN}', "line 11, column 65: "),
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "7"}', "column 'score_chosen' is a string"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1e39}', "column 'score_chosen' is 1e+39"),
        ("[" * 2000 + "]" * 2000, "line 11, column "),
        ("[]", "the record is a list, not an object"),
        ('{"prompt": "q", "chosen": "a"}', "no column 'rejected', found: prompt, chosen"),
    ],
)
def test_a_broken_record_costs_its_row_alone(record, detail):
    output = Parse(dataset="pairs").apply(raw(record, GOOD))
    assert output.kept["source_row"].to_pylist() == [11]
    (dropped,) = output.dropped.to_pylist()
    assert dropped["detail"].startswith(detail)
    assert (dropped["step"], dropped["reason"], dropped["id"]) == ("parse", "unparsable", None)
    assert (dropped["source_file"], dropped["source_row"], dropped["row"]) == ("a.jsonl", 10, record)


@pytest.mark.parametrize("dataset", ["pairs", "hh-rlhf", "ultrafeedback"])
def test_no_rows(dataset):
    output = Parse(dataset=dataset).apply(raw())
    assert (len(output.kept), len(output.dropped)) == (0, 0)
    assert "source_row" in output.kept.schema.names


def test_int_scores_beyond_exact_float32():
    output = Parse(dataset="pairs").apply(raw(GOOD.replace(": 2}", ": 16777217}")))
    assert output.kept["score_chosen"].to_pylist() == [16777216.0]


def test_unknown_column_key_is_refused():
    assert Parse(dataset="pairs", columns={"chosen": "good"}).columns == {"chosen": "good"}
    with pytest.raises(ValidationError, match="unknown key 'chosn' for pairs, did you mean 'chosen'"):
        Parse(dataset="pairs", columns={"chosn": "good"})


RECORDS = st.lists(
    st.one_of(
        st.just(GOOD),
        st.text(st.characters(codec="utf-8"), max_size=8),
        st.fixed_dictionaries(
            {name: st.text(st.characters(codec="utf-8"), max_size=4) for name in ("prompt", "chosen", "rejected")},
            optional={"score_chosen": st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.none()},
        ).map(lambda record: orjson.dumps(record).decode()),
    ),
    max_size=12,
)


@given(RECORDS, st.integers(1, 5))
def test_rows_are_accounted_for_and_batching_changes_nothing(records, size):
    step, table = Parse(dataset="pairs"), raw(*records)
    whole = step.apply(table)
    assert len(whole.kept) + len(whole.dropped) == len(records)
    assert sorted((*whole.kept["source_row"].to_pylist(), *whole.dropped["source_row"].to_pylist())) == list(
        range(10, 10 + len(records))
    )
    parts = [step.apply(table.slice(start, size)) for start in range(0, len(records), size)]
    if parts:
        assert pa.concat_tables([part.kept for part in parts]).to_pylist() == whole.kept.to_pylist()
        assert pa.concat_tables([part.dropped for part in parts]).to_pylist() == whole.dropped.to_pylist()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real HH-RLHF files of ../shared/data are not here")
def test_real_transcripts_all_become_rows():
    lines = gzip.decompress((REAL / "harmless-base" / "test.jsonl.gz").read_bytes()).decode().splitlines()
    output = Parse(dataset="hh-rlhf").apply(raw(*lines))
    assert (len(output.kept), len(output.dropped)) == (1515, 0)
    assert len(set(output.kept["id"].to_pylist())) == 1515
