"""HH-RLHF: transcripts to turns, two transcripts to a pair."""

import gzip
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import ORIGIN, PAIRS
from orpo_data.sources.hh_rlhf import EXCLUDE, LABEL, ROLES, parse, parse_transcript
from orpo_data.sources.record import MissingColumn, Unparsable

REAL = Path(__file__).parents[4] / "shared" / "data" / "hh_rlhf"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def transcript(*turns: dict[str, str]) -> str:
    labels = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{labels[turn['role']]}: {turn['content']}" for turn in turns)


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("\n\nHuman: hi\n\nAssistant: hello", [user("hi"), assistant("hello")]),
        ("Human: hi\n\nAssistant: hello", [user("hi"), assistant("hello")]),
        ("\n\n\nHuman: hi", [user("hi")]),
        ("\n\nHum: hi\n\nAssistant:hello", [user("hi"), assistant("hello")]),
        ("\r\n\r\nHuman: hi\r\n\r\nAssistant: a\r\n\r\nb\r\n", [user("hi"), assistant("a\r\n\r\nb")]),
        ("\n\nHuman: a\n\nb\n\n\nAssistant:  c \n", [user("a\n\nb"), assistant("c")]),
        ("\n\nHuman: hi\n\nAssistant:", [user("hi"), assistant("")]),
        ("\n\nHuman:\n\nAssistant: ", [user(""), assistant("")]),
        ("\n\nHuman: a\n\nHuman: b", [user("a"), user("b")]),
        ("\n\nAssistant: first", [assistant("first")]),
        # a label that begins no turn is something that was said
        ("\n\nHuman: say\nAssistant: x", [user("say\nAssistant: x")]),
        ("\n\nHuman: an Assistant: label", [user("an Assistant: label")]),
        ("\n\nHuman: a\n\nHumans: many", [user("a\n\nHumans: many")]),
        ("\n\nHuman: a\n\n Human: b", [user("a\n\n Human: b")]),
        ("\n\nHuman: a\n\nhuman: b", [user("a\n\nhuman: b")]),
    ],
)
def test_transcripts_by_hand(text, turns):
    assert parse_transcript(text) == turns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no 'Human:' or 'Assistant:' label in ''"),
        ("just text", "no 'Human:' or 'Assistant:' label in 'just text'"),
        ("x" * 50, f"'{'x' * 40}...'"),
        ("Hello\n\nHuman: hi", "text before the first label: 'Hello'"),
    ],
)
def test_no_transcript(text, message):
    with pytest.raises(Unparsable) as error:
        parse_transcript(text)
    assert message in str(error.value)


CONTENT = st.lists(st.sampled_from(["a", "Human", ":", "Assistant: ", " ", "\n", "\n\n", "\r\n", "é", "Hum"])).map(
    lambda parts: "".join(parts).strip()
)
SAID = CONTENT.filter(lambda content: not LABEL.search(f"x{content}"))
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": SAID}), min_size=1, max_size=6
)


@given(TURNS)
def test_composed_turns_parse_back(turns):
    assert parse_transcript(transcript(*turns)) == turns


@given(TURNS, TURNS, TURNS)
def test_pair_shares_whole_turns_and_loses_none(history, chosen, rejected):
    row = parse({"chosen": transcript(*history, *chosen), "rejected": transcript(*history, *rejected)}, {})
    assert row["prompt"] + row["chosen"] == history + chosen
    assert row["prompt"] + row["rejected"] == history + rejected
    assert len(row["prompt"]) >= len(history)
    # the shared part is the longest one that leaves each side a turn
    assert len(row["chosen"]) == 1 or len(row["rejected"]) == 1 or row["chosen"][0] != row["rejected"][0]


def pair(chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> tuple[list, list, list]:
    row = parse({"chosen": transcript(*chosen), "rejected": transcript(*rejected)}, {})
    return row["prompt"], row["chosen"], row["rejected"]


def test_answers_with_a_common_opening_keep_it():
    sides = pair([user("q"), assistant("Sure, yes")], [user("q"), assistant("Sure, no")])
    assert sides == ([user("q")], [assistant("Sure, yes")], [assistant("Sure, no")])


def test_same_transcript_twice_keeps_the_last_turn():
    turns = [user("q"), assistant("a")]
    assert pair(turns, turns) == ([user("q")], [assistant("a")], [assistant("a")])


def test_histories_that_part_early_keep_their_turns():
    chosen = [user("q"), assistant("a"), user("r"), assistant("x")]
    rejected = [user("q"), assistant("b"), user("r"), assistant("y")]
    assert pair(chosen, rejected) == ([user("q")], chosen[1:], rejected[1:])


def test_one_side_goes_on_longer():
    long = [user("q"), assistant("a"), user("r"), assistant("x")]
    assert pair(long[:2], long) == ([user("q")], [assistant("a")], long[1:])


def test_a_single_turn_leaves_no_prompt():
    assert pair([user("q")], [user("q")]) == ([], [user("q")], [user("q")])


def test_row_has_every_content_column():
    row = parse({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}, {})
    assert ["id", *row, *(field.name for field in ORIGIN)] == PAIRS.names
    assert {name for name, value in row.items() if value is None} == set(row) - {"prompt", "chosen", "rejected"}


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"chosen": "\n\nHuman: q"}, MissingColumn, "no column 'rejected', found: chosen"),
        ({}, MissingColumn, "no column 'chosen', found: none"),
        ({"chosen": None, "rejected": "x"}, Unparsable, "column 'chosen' is null"),
        ({"chosen": 1, "rejected": "x"}, Unparsable, "column 'chosen' is a number, not a string"),
        ({"chosen": "\n\nHuman: q", "rejected": "x"}, Unparsable, "rejected: no 'Human:'"),
        (["x"], Unparsable, "the record is a list, not an object"),
    ],
)
def test_unparsable(record, error, message):
    with pytest.raises(error) as caught:
        parse(record, {})
    assert message in str(caught.value)
    assert type(caught.value) is error


def test_columns_by_other_names():
    record = {"better": "\n\nHuman: q\n\nAssistant: a", "x": {"worse": "\n\nHuman: q\n\nAssistant: b"}}
    row = parse(record, {"chosen": "better", "rejected": "x.worse"})
    assert (row["chosen"], row["rejected"]) == ([assistant("a")], [assistant("b")])


def test_red_team_attempts_are_left_out():
    assert any("red-team-attempts" in pattern for pattern in EXCLUDE)
    assert set(ROLES.values()) == {"user", "assistant"}


COUNTED = {  # rows, identical sides, histories that differ, roles that do not alternate, empty last turns
    "harmless-base": (1515, 0, 5, 8, 3),
    "helpful-base": (1571, 1, 6, 7, 4),
    "helpful-online": (750, 2, 2, 0, 3),
    "helpful-rejection-sampled": (1876, 23, 2, 2, 0),
}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real HH-RLHF files of ../shared/data are not here")
@pytest.mark.parametrize("subset", COUNTED)
def test_real_rows_are_all_parsed(subset):
    counts = Counter()
    for line in gzip.decompress((REAL / subset / "test.jsonl.gz").read_bytes()).splitlines():
        row = parse(orjson.loads(line), {})
        sides = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        counts["rows"] += 1
        counts["identical"] += sides[0] == sides[1]
        counts["diverges"] += max(len(row["chosen"]), len(row["rejected"])) > 1
        counts["not alternating"] += any(
            turn["role"] != ("user", "assistant")[i % 2] for side in sides for i, turn in enumerate(side)
        )
        counts["empty"] += any(not side[-1]["content"] for side in sides)
    assert tuple(counts.values()) == COUNTED[subset]
