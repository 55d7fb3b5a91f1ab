"""Messages that are equal up to case, spacing and Unicode form have one hash, all others another."""

import hashlib

import polars as pl
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.schema import MESSAGES
from orpo_data.steps.folds import TAME, _folded, message_hashes

Messages = list[dict[str, str]]

piece = st.one_of(
    st.sampled_from(["oak", "Oak", " ", "\n", "\u00a0", "\x1f", "\x1c", "\u2028", "?", "\u2019", "\u2026"]),
    st.sampled_from(["caf\u00e9", "CAF\u00c9", "e\u0301", "\u0301", "\u00df", "\u0130", "\ufb01", "\u03a3", "\u6771"]),
    st.sampled_from(["\U0001f600\ufe0f"]),
    st.text(max_size=2),
)  # fmt: skip
role = st.sampled_from(["user", "assistant"])
turn = st.fixed_dictionaries({"role": role, "content": st.lists(piece, max_size=5).map("".join)})
rows = st.lists(st.lists(turn, max_size=3), max_size=5)


def hashes(rows: list[Messages]) -> list[int]:
    dtype = pl.List(pl.Struct({field.name: pl.String for field in MESSAGES.value_type}))
    return message_hashes(pl.DataFrame({"chosen": pl.Series(rows, dtype=dtype)}), "chosen").tolist()


def folded(turns: Messages) -> tuple[tuple[str, str], ...]:
    """The definition."""
    return tuple((turn["role"], _folded(turn["content"])) for turn in turns)


def say(*contents: str) -> Messages:
    return [{"role": "user", "content": content} for content in contents]


@given(rows)
@example([[], say(""), say("", ""), say(" "), say("a\x1fuser\x1fb"), say("a", "b"), say("a user b")])
@example([say("\u00c9t\u00e9"), say("\u00e9t\u00e9"), say("e\u0301te\u0301"), say("ete"), say("\ufb01t"), say("fit")])
def test_equal_hashes_are_equal_messages(rows: list[Messages]) -> None:
    found = hashes(rows)
    names = [folded(turns) for turns in rows]
    assert len(set(found)) == len(set(names)) == len(set(zip(found, names, strict=True)))
    assert [hashes([turns])[0] for turns in rows] == found


def test_what_is_hashed_is_the_same_in_every_release() -> None:
    """Notes are kept on disk from run to run: where this changes, the version of each step that takes them must."""
    row = [*say(" How\n ARE \u2018you\u2019? "), {"role": "assistant", "content": "Stra\u00dfe"}]
    hashed = hashlib.sha256("user \x1f how are \u2018you\u2019? \x1f assistant \x1f strasse".encode()).hexdigest()
    assert hashes([row]) == [int(hashed[:16], 16)]


def test_characters_beyond_ascii_are_what_they_are_taken_for() -> None:
    for first, last in TAME:
        for letter in map(chr, range(first, last + 1)):
            assert _folded(f"a{letter}b") == f"a{letter.lower()}b"
