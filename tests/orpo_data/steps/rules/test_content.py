"""Each content rule on hand-worked pairs: what it finds, on which side, with which figure, and what it passes."""

import importlib.util

import pytest
from pydantic import ValidationError

from orpo_data.errors import UsageError
from orpo_data.steps.rules.content import (
    Boilerplate,
    Language,
    LengthRatio,
    PersonalData,
    Refusal,
    Repetition,
    RoleLabelInText,
    TooLong,
    TooShort,
)

# --- labels and lengths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "found"),
    [
        ("Q?", "Fine.\n\nHuman: And you?", "No.", [("chosen", "1")]),
        ("Q?", "Yes.", "Human: No.\nAssistant: Yes.", [("rejected", "2")]),
        ("Q?", "USER: a", "ai: b", [("both", "1 and 1")]),
        ("Hi.\n  ** Hum : Hi.", "Human: Yes.", "No.", [("prompt", "1"), ("chosen", "1")]),
        ("Who is human: you or me?", "The user: nobody.", "Humans: all of us. Assistants: none.", []),
    ],
)
def test_role_label_in_text(judge, prompt, chosen, rejected, found):
    expected = [(side, f"{side}: {figure} at the start of a line") for side, figure in found]
    assert judge(RoleLabelInText(), prompt, chosen, rejected) == expected


def test_too_short(judge):
    assert judge(TooShort(at_least=4), "Q?", "abc", "abcd") == [("chosen", "chosen: 3 characters, at least 4")]
    assert judge(TooShort(at_least=4), "Q?", "abcd", " a \n\n\n") == [
        ("rejected", "rejected: 1 characters, at least 4")
    ]
    assert judge(TooShort(at_least=4), "Q?", "a", "ab") == [("both", "both: 1 and 2 characters, at least 4")]
    assert judge(TooShort(at_least=4), "Q?", "日本語です", "abcd") == []


def test_too_long(judge):
    rule = TooLong(at_most=5)
    assert judge(rule, "123456", "12345", "1") == [("prompt", "prompt: 6 characters, at most 5")]
    assert judge(rule, "12345", "1234567", "123456") == [("both", "both: 7 and 6 characters, at most 5")]
    assert judge(rule, "Q?", "1", "äöüßéç") == [("rejected", "rejected: 6 characters, at most 5")]


def test_a_huge_message(judge):
    """10 MB in one turn."""
    huge = "word " * 2_000_000
    assert judge(TooLong(), "Q?", huge, "No.") == [("chosen", "chosen: 10000000 characters, at most 50000")]
    assert judge(Repetition(), "Q?", huge, "No.") == [("chosen", "chosen: 1.0 of 3-grams repeat, at most 0.5")]


def test_length_ratio(judge):
    rule = LengthRatio(at_most=10)
    detail = "times as long as the other answer, at most 10"
    assert judge(rule, "Q?", "a" * 25, "b" * 2) == [("chosen", f"chosen: 12.5 {detail}")]
    assert judge(rule, "Q?", "a", "b" * 11) == [("rejected", f"rejected: 11.0 {detail}")]
    assert judge(rule, "Q?", "a" * 20, "b" * 2) == []


# --- repetition ------------------------------------------------------------------------------------------------------


def test_repetition(judge):
    """8 words have 6 3-grams; of "a b c a b c a b" abc, bca and cab are distinct, so half of the 6 repeat."""
    half = "a b c, a B c! A b"
    assert judge(Repetition(words_at_least=8, at_most=0.49), "Q?", half, "No.") == [
        ("chosen", "chosen: 0.5 of 3-grams repeat, at most 0.49")
    ]
    assert judge(Repetition(words_at_least=8, at_most=0.5), "Q?", half, half) == []
    assert judge(Repetition(words_at_least=9, at_most=0.4), "Q?", half, half) == []
    assert judge(Repetition(words_at_least=1, at_most=0.0, ngram=1), "Q?", "a b c", "so so") == [
        ("rejected", "rejected: 0.5 of 1-grams repeat, at most 0")
    ]


def test_too_few_words_for_an_ngram_do_not_repeat(judge):
    assert judge(Repetition(words_at_least=1, at_most=0.0), "Q?", "no no", "👍👍👍") == []


# --- phrases ---------------------------------------------------------------------------------------------------------

REFUSALS = [
    "I cannot assist with that.",
    "I'm sorry, but I can't help you with that.",
    "I\u2019m sorry, I can\u2019t answer that.",
    "I am unable to provide medical advice.",
    "As an AI language model, I cannot generate inappropriate content.",
    "I won't do that.",
    "I don't feel comfortable talking about this.",
    "I'd rather not say.",
    "Sorry. I am not comfortable with this.",
    "I can't tell you how to get into someone's account.",
]
ANSWERS = [
    "I can't help but notice the sea.",
    "I'm sorry I couldn't help you more.",
    "I'm sorry, but I can\u2019t think of many others besides spinach.",
    "Sure, but I can't tell you if it's a good joke or not.",
    "You cannot assist at an election without papers.",
    "I can help you with that. I will answer every question.",
    "Once upon a time there was a door. " * 10 + '"I cannot help you," it said.',  # a story, past the opening
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusal(judge, text):
    assert judge(Refusal(), "Q?", text, ANSWERS[5]) == [("chosen", "chosen")]
    assert judge(Refusal(), "Q?", ANSWERS[5], text) == [("rejected", "rejected")]
    assert judge(Refusal(), "Q?", text, text) == [("both", "both")]


@pytest.mark.parametrize("text", ANSWERS)
def test_no_refusal(judge, text):
    assert judge(Refusal(), REFUSALS[0], text, "Yes.") == []


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I have read a lot.",
        "The sky is blue. As a responsible and ethical AI language model, I must say so.",
        "as an AI developed by OpenAI, I don't know.",
        "I\u2019m just an AI!",
        "I am a large language model.",
        "That was after my knowledge cutoff.",
        "I don't have personal opinions.",
    ],
)
def test_boilerplate(judge, text):
    assert judge(Boilerplate(), "Q?", text, "Yes.") == [("chosen", "chosen")]
    assert judge(Boilerplate(), text, "Yes.", text) == [("rejected", "rejected")]


@pytest.mark.parametrize(
    "text", ["She works as an AI engineer in Rome.", "A language model predicts words.", "I am an aid."]
)
def test_no_boilerplate(judge, text):
    assert judge(Boilerplate(), "Q?", text, text) == []


# --- personal data ---------------------------------------------------------------------------------------------------


def test_personal_data_is_counted_and_not_told(judge):
    mail, phone = "joe@mail.org", "+44 20 7946 0958"
    found = judge(PersonalData(), f"I am {mail}", f"{mail}, {mail}, {phone}", f"Call {phone}")
    assert found == [("prompt", "prompt: 1 email"), ("both", "both: 2 email, 1 phone and 1 phone")]
    assert judge(PersonalData(kinds=["phone"]), f"I am {mail}", "Yes.", phone) == [("rejected", "rejected: 1 phone")]
    assert judge(PersonalData(), "Q?", "joe at mail", "No.") == []
    assert judge(PersonalData(), "Q?", "joe.@mail.org", "No.") == [("chosen", "chosen: 1 email")]


# --- language --------------------------------------------------------------------------------------------------------

ENGLISH = "The evening sky is red because the light has a long way through the air."
GERMAN = "Der Abendhimmel ist rot, weil das Licht einen langen Weg durch die Luft hat."
NORWEGIAN = "Kveldshimmelen er rød fordi lyset har en lang vei gjennom luften, og det er ikke så rart."


def test_language(judge):
    (found,) = judge(Language(), "Why is it red?", GERMAN, ENGLISH)
    assert found[0] == "chosen"
    assert found[1].startswith("chosen: de (")
    assert found[1].endswith(") is not among en")
    assert [side for side, _ in judge(Language(), GERMAN, GERMAN, GERMAN)] == ["prompt", "both"]
    assert judge(Language(keep=["en", "de"]), GERMAN, ENGLISH, GERMAN) == []
    assert [side for side, _ in judge(Language(keep=["de"]), GERMAN, ENGLISH, GERMAN)] == ["chosen"]


@pytest.mark.parametrize(
    "text", ["Yes.", "OK.", "lol", "12, 34, 56", "👍", "print(x)", "Bonjour", "Search for Halsey songs"]
)
def test_short_texts_pass(judge, text):
    assert judge(Language(), text, text, text) == []


def test_norwegian_is_not_false(judge):
    """As YAML reads `keep: [no]`."""
    rule = Language.model_validate({"action": "flag", "keep": [False]})
    assert rule.keep == ("no",)
    assert judge(rule, NORWEGIAN, NORWEGIAN, NORWEGIAN) == []
    assert len(judge(rule, GERMAN, NORWEGIAN, NORWEGIAN)) == 1


def test_a_language_nobody_can_tell(judge):
    with pytest.raises(UsageError, match=r"^clean\.language\.keep: 'english' is no two-letter code"):
        judge(Language(keep=["en", "english"]), "Q?", "Yes.", "No.")


def test_the_library_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("orpo_data.extras.find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        Language(action="flag")
    assert str(error.value) == "clean.language: needs the package py3langid: pip install 'orpo-pipeline[language]'"
    assert Language(action="off") == Language()


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (TooShort, {"at_least": 0}),
        (LengthRatio, {"at_most": 0.5}),
        (Repetition, {"at_most": 1.5}),
        (Repetition, {"ngram": 0}),
        (PersonalData, {"kinds": ["shoe size"]}),
        (PersonalData, {"kinds": []}),
        (Language, {"keep": []}),
    ],
)
def test_thresholds_out_of_range(rule, settings):
    with pytest.raises(ValidationError):
        rule(**settings)
