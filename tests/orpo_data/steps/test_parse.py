"""The parse step: every record becomes a row or a dropped row that says why."""

import gzip
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orpo_data.schema import DROPPED, PAIRS, RATED, RAW, pair_id
from orpo_data.sources.hh_rlhf import format_transcript
from orpo_data.sources.json_text import NOT_UTF8
from orpo_data.steps import parse
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


def test_nul_bytes_stay_where_they_were_said():
    output = Parse(dataset="pairs").apply(raw(GOOD.replace("yes", "y\\u0000s")))
    assert output.kept["chosen"].to_pylist() == [[{"role": "assistant", "content": "y\0s"}]]


def test_records_with_the_same_content_are_rows_with_one_id():
    output = Parse(dataset="pairs").apply(raw(GOOD, GOOD))
    first, second = output.kept.to_pylist()
    assert second == first | {"source_row": 11}


def test_a_message_of_ten_million_letters():
    record = orjson.dumps({"prompt": "q", "chosen": "x" * 10_000_000, "rejected": "no"}).decode()
    broken = record.removesuffix("}")
    output = Parse(dataset="pairs").apply(raw(record, broken))
    assert output.kept["chosen"].to_pylist()[0][0]["content"] == "x" * 10_000_000
    (dropped,) = output.dropped.to_pylist()
    assert dropped["row"] == broken
    assert len(dropped["detail"]) < 100


@pytest.mark.parametrize(("rating", "reason"), [("5", None), ("6", "Rating is 6, not within 1 to 5"), ("N/A", None)])
def test_ratings_off_the_scale_cost_the_prompt(rating, reason):
    answer = {"response": "a", "annotations": {"honesty": {"Rating": rating}}}
    record = {"instruction": "q", "completions": [{"response": "b"}, answer]}
    output = Parse(dataset="ultrafeedback").apply(raw(orjson.dumps(record).decode()))
    details = [f"completions[1].annotations.honesty.{reason}"] if reason else []
    assert output.dropped["detail"].to_pylist() == details
    assert len(output.kept) == 1 - len(details)


# --- dialogues whose histories part early ----------------------------------------------------------------------------


def dialogue(*contents: str) -> str:
    """Each content begins with the label's first letter: "H:hello"."""
    labels = {"H": "Human", "A": "Assistant"}
    return "".join(f"\n\n{labels[content[0]]}: {content[2:]}" for content in contents)


def parted(chosen: str, rejected: str, diverges: str) -> tuple[str, str, str, int]:
    """Prompt, chosen, rejected as transcripts, and the number of changed rows."""
    record = orjson.dumps({"chosen": chosen, "rejected": rejected}).decode()
    output = Parse(dataset="hh-rlhf", diverges=diverges).apply(raw(record))
    (row,) = output.kept.to_pylist()
    assert row["id"] == pair_id(row["prompt"], row["chosen"], row["rejected"])
    return *(format_transcript(row[side]) for side in ("prompt", "chosen", "rejected")), output.changed


@pytest.mark.parametrize(
    ("chosen", "rejected", "cut"),
    [
        # the first answers that differ become the pair
        (("H:q", "A:b", "H:r", "A:c"), ("H:q", "A:x", "H:r", "A:y"), (("H:q",), ("A:b",), ("A:x",))),
        (("H:q", "A:b"), ("H:q", "A:x", "H:r", "A:y"), (("H:q",), ("A:b",), ("A:x",))),
        (
            ("H:q", "A:a", "H:r", "A:b"),
            ("H:q", "A:a", "H:r", "A:x", "H:s"),
            (("H:q", "A:a", "H:r"), ("A:b",), ("A:x",)),
        ),
        (("H:q", "A:b", "A:c"), ("H:q", "A:x"), (("H:q",), ("A:b",), ("A:x",))),
        # other questions, or one dialogue that goes on: nothing was compared
        (("H:q", "A:b", "H:r", "A:c"), ("H:q", "A:b", "H:s", "A:y"), None),
        (("H:q", "A:b"), ("H:z", "A:b", "H:r", "A:c"), None),
        (("H:q", "A:b"), ("H:q", "A:b", "H:r", "A:c"), None),
        (("H:q", "A:b", "H:r"), ("H:q", "H:z", "A:y"), None),
        # nothing to cut
        (("H:q", "A:b"), ("H:q", "A:x"), None),
        (("H:q", "A:b"), ("H:q", "A:b"), None),
        (("H:q",), ("H:q",), None),
    ],
)
def test_keep_common_prefix(chosen, rejected, cut):
    transcripts = dialogue(*chosen), dialogue(*rejected)
    as_it_is = parted(*transcripts, "drop")
    assert as_it_is[0] + as_it_is[1] == transcripts[0]
    assert as_it_is[0] + as_it_is[2] == transcripts[1]
    expected = as_it_is if cut is None else (*(dialogue(*side) for side in cut), 1)
    assert parted(*transcripts, "keep-common-prefix") == expected


def test_diverging_conversations_of_any_source_of_pairs():
    answer, asks = {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}
    record = {"chosen": [asks, answer], "rejected": [asks, answer | {"content": "b"}, asks, answer]}
    output = Parse(dataset="pairs", diverges="keep-common-prefix").apply(raw(orjson.dumps(record).decode()))
    assert output.kept["rejected"].to_pylist() == [[answer | {"content": "b"}]]
    with pytest.raises(ValidationError, match="diverges: ultrafeedback has no dialogues"):
        Parse(dataset="ultrafeedback", diverges="keep-common-prefix")


def test_unknown_column_key_is_refused():
    assert Parse(dataset="pairs", columns={"chosen": "good"}).columns == {"chosen": "good"}
    with pytest.raises(ValidationError, match="unknown key 'chosn' for pairs, did you mean 'chosen'"):
        Parse(dataset="pairs", columns={"chosn": "good"})


KEYS = ["prompt", "chosen", "rejected", "instruction", "completions", "response", "role", "content", "overall_score"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
RECORDS = st.lists(
    st.one_of(
        JSON.map(lambda value: orjson.dumps(value).decode()),
        st.just(GOOD),
        st.text(st.characters(codec="utf-8"), max_size=8),
        st.fixed_dictionaries(
            {name: st.text(st.characters(codec="utf-8"), max_size=4) for name in ("prompt", "chosen", "rejected")},
            optional={"score_chosen": st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.none()},
        ).map(lambda record: orjson.dumps(record).decode()),
    ),
    max_size=12,
)


@given(st.sampled_from(["pairs", "hh-rlhf", "ultrafeedback"]), RECORDS, st.integers(1, 5))
def test_rows_are_accounted_for_and_batching_changes_nothing(dataset, records, size):
    step, table = Parse(dataset=dataset), raw(*records)
    whole = step.apply(table)
    assert len(whole.kept) + len(whole.dropped) == len(records)
    assert sorted((*whole.kept["source_row"].to_pylist(), *whole.dropped["source_row"].to_pylist())) == list(
        range(10, 10 + len(records))
    )
    parts = [step.apply(table.slice(start, size)) for start in range(0, len(records), size)]
    if parts:
        assert pa.concat_tables([part.kept for part in parts]).to_pylist() == whole.kept.to_pylist()
        assert pa.concat_tables([part.dropped for part in parts]).to_pylist() == whole.dropped.to_pylist()


TEXT = st.text(st.characters(codec="utf-8"), max_size=4)
FIGURE = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.just(0)
SCORE = st.sampled_from([0, -0.0, 1, 2.5, 4, 5.0])
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "Assistant", "system"]), "content": TEXT})
SHAREGPT = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "narrator"]), "value": TEXT})
SIDES = [TEXT, TURN, st.lists(TURN, max_size=3), st.lists(SHAREGPT, max_size=3)]
ANSWER = st.fixed_dictionaries(
    {"response": TEXT, "overall_score": SCORE},
    optional={
        "model": TEXT | st.none(),
        "custom_system_prompt": TEXT,
        "annotations": st.none()
        | st.dictionaries(
            st.sampled_from(["helpfulness", "honesty"]),
            st.none() | st.fixed_dictionaries({}, optional={"Rating": st.sampled_from(["1", "5.0", "N/A", "six"])}),
        ),
    },
)
SHAPES = {
    "pairs": st.sampled_from(SIDES).flatmap(
        lambda side: st.lists(
            st.fixed_dictionaries(
                {"chosen": side, "rejected": side},
                optional={
                    "prompt": TEXT | st.none(),
                    "conversations": st.none(),
                    "subset": TEXT,
                    "score_chosen": FIGURE,
                    "metadata": st.none() | st.fixed_dictionaries({}, optional={"score_chosen": FIGURE, "n": SCORE}),
                },
            )
        )
    ),
    "hh-rlhf": st.lists(st.fixed_dictionaries({"chosen": TEXT, "rejected": TEXT}, optional={"id": FIGURE})),
    "ultrafeedback": st.lists(
        st.fixed_dictionaries(
            {"instruction": TEXT, "completions": st.lists(ANSWER, max_size=3)}, optional={"source": TEXT | st.none()}
        )
    ),
}
SPOILT = st.sampled_from([None, True, 1, "x", [], {}, [None], [{"role": None}], {"score_chosen": "high"}])


@st.composite
def alike(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Records of one shape, save perhaps for one value, written as JSON."""
    dataset = draw(st.sampled_from([*SHAPES]))
    records = draw(SHAPES[dataset])
    if records and draw(st.booleans()):
        records[draw(st.integers(0, len(records) - 1))][draw(st.sampled_from([*records[0], "metadata"]))] = draw(SPOILT)
    return dataset, [orjson.dumps(record).decode() for record in records]


def check_together(dataset: str, texts: list[str]) -> None:
    """What records become together is what each becomes by itself."""
    step, table = Parse(dataset=dataset), raw(*texts)
    together, (by_itself, _) = step.apply(table), step._one_by_one(table)
    assert together.kept.schema == by_itself.kept.schema
    assert repr(together.kept.to_pylist()) == repr(by_itself.kept.to_pylist())  # tells 0 from -0
    assert together.dropped.equals(by_itself.dropped)
    assert together.changed == by_itself.changed


@given(alike(), st.sampled_from([1, 2, 32]))
def test_records_read_together_are_read_as_each_by_itself(records: tuple[str, list[str]], looked_at: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parse, "PIECE", looked_at)
        check_together(*records)


@pytest.mark.parametrize(
    "other",
    [
        {"subset": 1},
        {"subset": ["x"]},
        {"score_chosen": "2"},
        {"score_chosen": True},
        {"score_chosen": 1e39},
        {"score_chosen": -0.0},
        {"metadata.score_chosen": 1, "metadata": {"score_chosen": 2}},
        {"metadata.score_chosen": None, "metadata": {"score_chosen": 2}},
        {"metadata": {"score_chosen": 2}, "chosen_score": 1},
        {"metadata": 3},
        {"prompt": None},
        {"prompt": None, "conversations": [{"from": "human", "value": "c"}]},
        {"conversations": [{"from": "human", "value": "c"}]},
        {"chosen": 1},
        {"chosen": None},
        {"chosen": []},
        {"chosen": ["a"]},
        {"chosen": [None]},
        {"chosen": [{"role": "user", "content": "a"}, None]},
        {"chosen": [{"role": "user", "content": None}]},
        {"chosen": [{"role": "user"}]},
        {"chosen": [{"role": None, "content": "a"}]},
        {"chosen": [{"role": "nobody", "content": "a"}]},
        {"chosen": [{"role": "HUMAN", "content": "a"}]},
        {"chosen": [{"role": "user", "content": "a", "from": "gpt", "value": "b"}]},
        {"chosen": [{"role": 1, "content": "a"}]},
        {"chosen": [{"from": "human", "value": "a", "role": None}]},
        {"chosen": {"role": "user", "content": "a"}},
        *({"chosen": [{"role": "user", "content": "a", "tool_calls": calls}]} for calls in (None, [], [{"id": "x"}])),
        {"chosen": [{"role": "user", "content": "a", "function_call": {"name": "f"}}]},
    ],
)
@pytest.mark.parametrize("times", [1, 3])
def test_pairs_of_any_one_form_are_read_as_each_by_itself(other: dict[str, Any], times: int) -> None:
    same = other["chosen"] if type(other.get("chosen")) in (list, dict) else "b"
    record = {"prompt": "q", "chosen": "a", "rejected": same} | other
    check_together("pairs", [orjson.dumps(record).decode()] * times)


@pytest.mark.parametrize("missing", [{}, {"chosen": None}, {"chosen": []}, {"chosen": [None]}])
def test_one_conversation_that_is_missing(missing: dict[str, Any]) -> None:
    turn = [{"role": "user", "content": "a"}]
    whole = {"prompt": "q", "chosen": turn, "rejected": turn * 2}
    other = {"prompt": "q", "rejected": turn} | missing
    check_together("pairs", [orjson.dumps(record).decode() for record in (whole, other, whole)])


@pytest.mark.parametrize("missing", [{}, {"completions": None}, {"completions": []}, {"completions": [None]}])
def test_one_list_of_answers_that_is_missing(missing: dict[str, Any]) -> None:
    whole = {"instruction": "q", "completions": [{"response": "a", "overall_score": 8}]}
    records = (whole, {"instruction": "q"} | missing, whole)
    check_together("ultrafeedback", [orjson.dumps(record).decode() for record in records])


@pytest.mark.parametrize(
    "other",
    [
        {"completions": None},
        {"completions": []},
        {"completions": "a"},
        {"completions": ["a"]},
        {"completions": [None]},
        {"completions": [{"response": None}]},
        {"completions": [{"response": 1}]},
        {"completions": [{"response": "a", "model": 1}]},
        {"completions": [{"response": "a", "overall_score": 0}]},
        {"completions": [{"response": "a", "overall_score": -0.0}]},
        {"completions": [{"response": "a", "overall_score": 11}]},
        {"completions": [{"response": "a", "overall_score": " n/a "}]},
        {"completions": [{"response": "a", "overall_score": "7"}, {"response": "b"}]},
        {"completions": [{"response": "a", "overall_score": True}]},
        {"completions": [{"response": "a", "annotations": "good"}]},
        {"completions": [{"response": "a", "annotations": {}}, {"response": "b", "annotations": None}]},
        {"completions": [{"response": "a", "annotations": {"honesty": None}}]},
        {"completions": [{"response": "a", "annotations": {"honesty": "5"}}]},
        {"completions": [{"response": "a", "annotations": {"honesty": {"Rating": 5}}}]},
        {"completions": [{"response": "a", "annotations": {"honesty": {"Rating": "6"}}}]},
        {"completions": [{"response": "a", "annotations": {"honesty": [{"Rating": "5"}]}}]},
        {"instruction": None},
        {"source": 1},
    ],
)
@pytest.mark.parametrize("times", [1, 3])
def test_ratings_of_any_one_form_are_read_as_each_by_itself(other: dict[str, Any], times: int) -> None:
    record = {"instruction": "q", "completions": [{"response": "a", "overall_score": 8}]} | other
    check_together("ultrafeedback", [orjson.dumps(record).decode()] * times)


def test_a_whole_zero_has_no_sign() -> None:
    output = Parse(dataset="pairs").apply(raw(GOOD.replace("2", "-0"), GOOD.replace("2", "-0.0")))
    assert [str(score) for score in output.kept["score_chosen"].to_pylist()] == ["0.0", "-0.0"]


SAYS = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
ORDINARY = {
    "texts": ("hh-rlhf", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
    "prompt beside": ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b", "metadata": {"score_chosen": 8.5}}),
    "prompt inside": ("pairs", {"prompt": "q", "chosen": [*SAYS[:2]], "rejected": [SAYS[0], SAYS[2]], "id": 7}),
    "ShareGPT": (
        "pairs",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": [{"from": "gpt", "value": "a"}],
            "rejected": [{"from": "gpt", "value": "b"}],
        },
    ),
    "rated": (
        "ultrafeedback",
        {
            "instruction": "q",
            "models": ["m"],
            "completions": [
                {"model": "m", "response": "a", "overall_score": 8, "annotations": {"honesty": {"Rating": "4"}}},
                {"model": "n", "response": "b", "overall_score": 7.5, "annotations": {"honesty": {"Rating": "N/A"}}},
            ],
        },
    ),
}


@pytest.mark.parametrize("form", ORDINARY)
def test_ordinary_records_are_never_decoded(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the few that show what they are like."""
    dataset, record = ORDINARY[form]
    monkeypatch.delattr(parse, "Records")
    output = Parse(dataset=dataset).apply(raw(*[orjson.dumps(record).decode()] * 100))
    assert (len(output.kept), len(output.dropped)) == (100, 0)
    assert len({*output.kept["id"].to_pylist()}) == 1


@pytest.mark.parametrize("nested", ['{"a":' * 600 + "1" + "}" * 600, "[" * 1000 + "]" * 1000, '{"a":[' * 600])
def test_depth_costs_a_record_at_most(nested: str) -> None:
    deep = GOOD.replace("}", f', "more": {nested}}}')
    output = Parse(dataset="pairs").apply(raw(GOOD, deep, GOOD))
    assert 2 <= len(output.kept) == 3 - len(output.dropped)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real HH-RLHF files of ../shared/data are not here")
def test_real_transcripts_all_become_rows():
    lines = gzip.decompress((REAL / "harmless-base" / "test.jsonl.gz").read_bytes()).decode().splitlines()
    output = Parse(dataset="hh-rlhf").apply(raw(*lines))
    assert (len(output.kept), len(output.dropped), output.changed) == (1515, 0, 0)
    assert len(set(output.kept["id"].to_pylist())) == 1515
    cut = Parse(dataset="hh-rlhf", diverges="keep-common-prefix").apply(raw(*lines))
    assert (len(cut.kept), cut.changed) == (1515, 5)
    assert all(len(side) == 1 for side in (*cut.kept["chosen"].to_pylist(), *cut.kept["rejected"].to_pylist()))
