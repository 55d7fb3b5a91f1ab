"""HH-RLHF: transcripts to turns, two transcripts to a pair."""

import gzip
import re
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data.schema import ORIGIN, PAIRS
from orpo_data.sources.hh_rlhf import EXCLUDE, LABEL, ROLES, WHITE_SPACE, format_transcript, parse, parse_transcript
from orpo_data.sources.record import MissingColumn, Unparsable

REAL = Path(__file__).parents[4] / "shared" / "data" / "hh_rlhf"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def transcript(*turns: dict[str, str]) -> str:
    return format_transcript(turns)


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
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d", [user("a"), *map(assistant, "bc"), user("d")]),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b", [user("a"), assistant(""), user("b")]),
        ("\n\nHuman: a\u00a0\n\nAssistant: \u2003b\u2028c\x00", [user("a"), assistant("b\u2028c\x00")]),
        (
            "\n\nHuman: 你好\n\nAssistant: \U0001f469\u200d\U0001f4bb e\u0301",
            [user("你好"), assistant("👩\u200d💻 e\u0301")],
        ),
        ("\n\nHuman: a\n\nAssistant: Human: b", [user("a"), assistant("Human: b")]),  # the answer is such a line
        ("\n\nAssistant: first", [assistant("first")]),
        # a label that begins no turn is something that was said
        ("\n\nHuman: say\nAssistant: x", [user("say\nAssistant: x")]),
        ("\n\nHuman: an Assistant: label", [user("an Assistant: label")]),
        ("\n\nHuman: a\n\nHumans: many", [user("a\n\nHumans: many")]),
        ("\n\nHuman: a\n\n Human: b", [user("a\n\n Human: b")]),
        ("\n\nHuman: a\n\nhuman: b", [user("a\n\nhuman: b")]),
        ("\n\nHuman: a\n\nHuman\n\nHuman: b", [user("a\n\nHuman"), user("b")]),
        ("\n\nHuman: a\n\nAssistant : b", [user("a\n\nAssistant : b")]),
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
def test_formatted_turns_parse_back(turns):
    assert parse_transcript(format_transcript(turns)) == turns


PIECES = [
    "\n\nHuman: ",
    "\n\nAssistant: ",
    "\n\nHum:",
    "\r\n\r\nAssistant:",
    "Human:",
    "\n",
    "\n\n",
    " ",
    "a",
    "é",
    "\x00",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_formatting_settles_the_layout_and_nothing_else(text):
    try:
        turns = parse_transcript(text)
    except Unparsable:
        return
    assert parse_transcript(format_transcript(turns)) == turns
    assert not is_well_formed(text) or format_transcript(turns) == text


def is_well_formed(text: str) -> bool:
    """The layout as format_transcript describes it, read without the parser."""
    nothing, *said = re.split(r"\n\n(?:Human|Assistant): ", text)
    label_inside = re.compile(r"\n\r?\n(Human|Hum|Assistant):")
    return bool(said) and not nothing and all(part == part.strip() and not label_inside.search(part) for part in said)


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("\n\nHuman: a\n\nb\n\nAssistant: c", True),
        ("\n\nAssistant: \n\nHuman: ", True),
        ("\n\nHuman: a\n\nHuman: b", True),
        ("Human: a", False),
        ("\n\nHuman: a ", False),
        ("\n\nHuman:  a", False),
        ("\n\nHuman: a\n\nAssistant:", False),
        ("\n\nHuman: a\n\nHum: b", False),
        ("\n\nHuman: a\r\n\r\nAssistant: b", False),
        ("", False),
    ],
)
def test_well_formed(text, well_formed):
    assert is_well_formed(text) == well_formed
    assert not text or (format_transcript(parse_transcript(text)) == text) == well_formed


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


Q, A, R = user("q"), assistant("a"), user("r")
TRAPS = {
    "rejected cut at the length of chosen's prompt": (
        [Q, assistant("a longer answer"), R, assistant("x")],
        [Q, assistant("b"), R, assistant("y")],
        [Q],
    ),
    "a prefix by characters": ([Q, assistant("I can help: yes")], [Q, assistant("I can help: no")], [Q]),
    "human and assistant turns zipped": ([Q, R, A, assistant("x")], [Q, R, A, assistant("y")], [Q, R, A]),
    "every second turn taken for a human's": ([A, Q, R, assistant("x")], [A, Q, R, assistant("y")], [A, Q, R]),
    "split at every blank line": (
        [user("q\n\nmore"), assistant("x\n\nmore")],
        [user("q\n\nmore"), assistant("y\n\n1. more")],
        [user("q\n\nmore")],
    ),
    "split at every label": (
        [user("Human: Assistant: q"), assistant("x\nHuman: z")],
        [user("Human: Assistant: q"), assistant("y")],
        [user("Human: Assistant: q")],
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_of_other_parsers(trap):
    chosen, rejected, prompt = TRAPS[trap]
    assert pair(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


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


real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real HH-RLHF files of ../shared/data are not here")


def real_records(subset: str) -> list[dict[str, str]]:
    lines = gzip.decompress((REAL / subset / "test.jsonl.gz").read_bytes()).splitlines()
    return [orjson.loads(line) for line in lines]


@real_data
@pytest.mark.parametrize("subset", COUNTED)
def test_real_rows_are_all_parsed(subset):
    counts = Counter()
    for record in real_records(subset):
        row = parse(record, {})
        sides = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        counts["rows"] += 1
        counts["identical"] += sides[0] == sides[1]
        counts["diverges"] += max(len(row["chosen"]), len(row["rejected"])) > 1
        counts["not alternating"] += any(
            turn["role"] != ("user", "assistant")[i % 2] for side in sides for i, turn in enumerate(side)
        )
        counts["empty"] += any(not side[-1]["content"] for side in sides)
    assert tuple(counts.values()) == COUNTED[subset]


WELL_FORMED = {"harmless-base": 1508, "helpful-base": 1567, "helpful-online": 749, "helpful-rejection-sampled": 1876}
"""Rows of COUNTED whose two transcripts are well-formed; in the others a turn has white space at an end."""


@real_data
@pytest.mark.parametrize("subset", WELL_FORMED)
def test_real_transcripts_come_back_byte_for_byte(subset):
    well_formed = [record for record in real_records(subset) if all(map(is_well_formed, record.values()))]
    assert len(well_formed) == WELL_FORMED[subset]
    for record in well_formed:
        row = parse(record, {})
        for side in ("chosen", "rejected"):
            assert format_transcript(row["prompt"] + row[side]) == record[side]


@pytest.mark.parametrize(
    "text",
    ["x" * 10_000_000, "\n" * 10_000_000, "\n\nHuman" * 1_000_000, "\n\nHuman: a" * 500_000, "é\r\n\r\n" * 1_000_000],
    ids=["one line", "blank lines", "labels without a colon", "turns", "paragraphs"],
)
def test_huge_transcripts_take_time_in_proportion(text):
    started = time.monotonic()
    row = parse(
        {"chosen": f"\n\nHuman: q{text}\n\nAssistant: a", "rejected": f"\n\nHuman: q{text}\n\nAssistant: b"}, {}
    )
    assert (row["chosen"], row["rejected"]) == ([assistant("a")], [assistant("b")])
    assert time.monotonic() - started < 20  # about a second; hours if it were quadratic


def test_white_space_is_what_python_strips() -> None:
    assert sorted(WHITE_SPACE) == [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace() and not c.strip()]
