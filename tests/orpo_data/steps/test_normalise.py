"""What is altered and what is left alone; ids, counts and batches."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_data.errors import UsageError
from orpo_data.schema import PAIRS, SIDES, pair_id
from orpo_data.steps.clean import Clean
from orpo_data.steps.normalise import Normalise


@pytest.fixture(scope="session")
def normal(make_pair):
    """A text after the step."""

    def apply(text: str, **config) -> str:
        out = Normalise(**config).apply(pa.Table.from_pylist([make_pair(text)], schema=PAIRS))
        assert out.changed == (out.kept["prompt"].to_pylist()[0][0]["content"] != text)
        return out.kept["prompt"].to_pylist()[0][0]["content"]

    return apply


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\nd\te", "a\nb\nc\nd\te"),
        ("a\u0085b", "a\nb"),  # the new line of mainframes
        ("NUL\0 bell\a escape\x1b[0m del\x7f c1\x9f", "NUL bell escape[0m del c1"),
        ("\ufeffstart zero\u200bwidth word\u2060joiner soft\u00adhyphen", "start zerowidth wordjoiner softhyphen"),
        ("access\u202e\u2066 level\u2069", "access level"),
        ("cafe\u0301 A\u030a", "café Å"),
        ("e\u200b\u0301", "é"),  # what was invisible no longer parts a letter from its accent
    ],
)
def test_altered(normal, text, expected):
    assert normal(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "plain\n\n  text\twith  spaces ",
        "👩‍👩‍👧 ❤️",  # one family: joined by U+200D, which stays
        "می‌خواهم",  # Persian, with the non-joiner U+200C
        "עברית \u200fabc\u200e",  # direction marks, unlike overrides
        "x² ½ ﬁ \uff21",  # compatibility forms say something
        "“quotes” \u2013 dashes…",
        "Ã© stays without mojibake",
        "joe@mail.org stays without redact",
        "",
    ],
)
def test_left_alone(normal, text):
    assert normal(text) == text


def test_mojibake(normal):
    assert normal("cafÃ© â€œyesâ€\x9d plain \u2013 naïve", mojibake=True) == "café “yes” plain \u2013 naïve"


@pytest.mark.parametrize("text", ["Größe und Maß", "naïveté", "el señor está aquí", "Привет, мир", "日本語のテキスト"])
def test_utf8_read_as_latin1_is_undone(normal, text):
    assert normal(text.encode().decode("latin-1"), mojibake=True) == text


def test_redact(normal):
    text = "joe@mail.org, +44 20 7946 0958, 8.8.8.8"
    assert normal(text, redact=["email", "ip"]) == "[EMAIL], +44 20 7946 0958, [IP]"
    assert normal(text, redact=["email", "phone", "ip", "secret"]) == "[EMAIL], [PHONE], [IP]"


@pytest.mark.parametrize("off", ["control_characters", "nfc"])
def test_each_part_on_its_own(normal, off):
    text = "a\0b cafe\u0301"
    assert normal(text, **{off: False}) == {"control_characters": "a\0b café", "nfc": "ab cafe\u0301"}[off]


def test_every_side_and_turn_and_nothing_else(make_pair, turns):
    pair = make_pair(turns("a\0", "b", "c\0"), "d\0", "e", system_chosen="f\0", score_chosen=1.0, subset="g")
    out = Normalise().apply(pa.Table.from_pylist([pair, make_pair(source_row=1)], schema=PAIRS))
    assert out.changed == 1
    assert len(out.dropped) == 0
    changed, same = out.kept.to_pylist()
    assert same == make_pair(source_row=1)
    expected = pair | {"prompt": turns("a", "b", "c"), "chosen": [{"role": "assistant", "content": "d"}]}
    assert changed == expected | {"id": pair_id(*(expected[side] for side in SIDES))}


def test_a_turn_of_which_nothing_is_left_is_for_clean_to_drop(make_pair):
    out = Normalise().apply(pa.Table.from_pylist([make_pair("Q?", "\u200b\0", "No.")], schema=PAIRS))
    assert Clean().apply(out.kept).dropped["reason"].to_pylist() == ["empty_turn"]


def test_ftfy_is_not_installed(monkeypatch):
    monkeypatch.setattr("orpo_data.extras.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^normalise\.mojibake: needs the package ftfy: pip install 'orpo-pipeline"):
        Normalise(mojibake=True)
    assert not Normalise().mojibake


pieces = st.sampled_from(
    ["a", "\r\n", "\r", "\0", "\u200b", "e\u0301", "e\u200b\u0301", "joe@mail.org", "Ã©", "\x85", "👩‍👧", "한"]
)
texts = st.lists(pieces | st.text(max_size=3), max_size=5).map("".join)
steps = st.sampled_from([Normalise(), Normalise(nfc=False), Normalise(redact=["email", "phone"])])


@settings(max_examples=40)
@given(st.lists(st.tuples(texts, texts, texts), max_size=6), steps, st.integers(1, 4))
def test_once_is_enough_and_batches_do_not_matter(make_pair, drawn, step, batch):
    table = pa.Table.from_pylist([make_pair(*row, source_row=i) for i, row in enumerate(drawn)], schema=PAIRS)
    whole = step.apply(table)
    assert whole.kept.schema == PAIRS
    for before, after in zip(table.to_pylist(), whole.kept.to_pylist(), strict=True):
        assert after["id"] == pair_id(*(after[side] for side in SIDES))
        assert (after["id"] == before["id"]) == (after == before)
    again = step.apply(whole.kept)
    assert again.kept.equals(whole.kept)
    assert again.changed == 0
    parts = [step.apply(table.slice(start, batch)) for start in range(0, len(table), batch)]
    assert sum(part.changed for part in parts) == whole.changed
    assert pa.concat_tables([whole.kept.slice(0, 0), *(part.kept for part in parts)]).equals(whole.kept)
