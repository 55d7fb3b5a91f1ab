"""What is found and what is passed over, kind by kind. Keys are in parts, so that no scanner takes them for real."""

import re
import sys
import time

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_data.steps.personal_data import KINDS, hint, redact

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----"

FOUND = [
    ("email", "Write to Joe.Smith+news@mail.gmail.com.", "Write to [EMAIL]."),
    ("email", "<a.b@c-d.co.uk>, x_y@z.org", "<[EMAIL]>, [EMAIL]"),
    ("email", "joe.@mail.org, \u00b2@mail.org", "[EMAIL], [EMAIL]"),  # not by the book, but somebody's
    ("email", "j@a.1.b2.de", "[EMAIL]"),
    ("phone", "Call +44 20 7946 0958 now", "Call [PHONE] now"),
    ("phone", "(212) 736-5000 or 212-736-5001.", "[PHONE] or [PHONE]."),
    ("phone", "1-212-736-5000", "[PHONE]"),
    ("ip", "from 8.8.8.8, 93.184.216.34:80", "from [IP], [IP]:80"),
    ("ip", "2a00:1450:4001:81b::200e", "[IP]"),
    ("phone", "+855 12 345 678, +86 631 5678 9012, +800 1234 5678", "[PHONE], [PHONE], +800 1234 5678"),
    ("iban", "DE89 3704 0044 0532 0130 00 please", "[IBAN] please"),
    ("iban", "GB82WEST12345698765432", "[IBAN]"),
    ("credit_card", "4111 1111 1111 1111", "[CREDIT_CARD]"),
    ("credit_card", "5500-0000-0000-0004, 378282246310005", "[CREDIT_CARD], [CREDIT_CARD]"),
    ("secret", "id " + "AKIA" + "IOSFODNN7EXAMPLE", "id [SECRET]"),
    ("secret", "ghp_" + "a1B2" * 9, "[SECRET]"),
    ("secret", "sk-" + "proj-a1B2c3D4e5F6g7H8i9J0", "[SECRET]"),
    ("secret", f"key:\n{PEM}\nend", "key:\n[SECRET]\nend"),
    ("secret", PEM[:40] + " cut off here", "[SECRET]"),
]


@pytest.mark.parametrize(("kind", "text", "expected"), FOUND)
def test_found(kind, text, expected):
    result, found = redact(text, KINDS)
    assert result == expected
    assert list(found) == [kind]
    assert found[kind] == expected.count("[")


def test_every_kind_has_a_case():
    assert {kind for kind, _, _ in FOUND} == set(KINDS)


@pytest.mark.parametrize(
    "text",
    [
        "name@example.com, me@mail.example.org, root@host.test",  # RFC 2606
        "@joe on twitter, a @ b, foo@bar",
        "127.0.0.1 192.168.1.10 10.0.0.1 255.255.255.255 999.1.1.1",  # nobody's address
        "version 1.2.3, section 4.5.6.7.8, 12:30:45",
        "std::vector, a::b, dead::beef, 2001:db8::1, ::1",
        "1-800-273-8255, 888 736 9466, (212) 555-0123",  # toll-free, fiction
        "1234567890, 20230216, 3.14159265358979, 100-200-3000",
        "DE89 3704 0044 0532 0130 01",  # a wrong check digit
        "4111 1111 1111 1112, 1234 5678 9012 3456, 0000 0000 0000 0000",
        "sk-learn, sk-mobile-navigation-container-wide, the task-based-learning-of-many-things",
        "akia" + "iosfodnn7example",
        "-----BEGIN CERTIFICATE-----",
    ],
)
def test_passed_over(text):
    assert redact(text, KINDS) == (text, {})


def test_only_what_is_asked_for():
    assert redact("a@b.de 8.8.8.8", ["ip"]) == ("a@b.de [IP]", {"ip": 1})


def test_what_is_redacted_bares_its_neighbour():
    text = "4111 1111 1111 1111" + "ghp_" + "a1B2" * 9
    assert redact(text, KINDS) == ("[CREDIT_CARD][SECRET]", {"credit_card": 1, "secret": 1})


parts = st.sampled_from([text for _, text, _ in FOUND] + ["[EMAIL]", " ", "\n", "x", "7", "-", ".", "@", "+"])


@given(st.lists(parts | st.text(max_size=5), max_size=8).map("".join))
def test_nothing_is_left_to_redact(text):
    once, _ = redact(text, KINDS)
    again, found = redact(once, KINDS)
    assert (again, found) == (once, {})


def hinted(kind, texts):
    return pl.Series(texts, dtype=pl.String).str.contains(hint([kind])).to_list()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data())
def test_what_has_a_form_has_its_hint(kind, data):
    text = data.draw(st.from_regex(KINDS[kind].form))
    assert hinted(kind, [text]) == [True]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, text, _ in FOUND])
def test_what_is_found_has_its_hint(kind, text):
    assert hinted(kind, [text]) == [True]


def test_what_is_a_digit_to_python_is_one_to_polars():
    """Forms are written for Python, hints for polars: its tables of characters must not be the older ones."""
    digits = [chr(code) for code in range(sys.maxunicode) if re.match(r"\d", chr(code))]
    assert pl.Series(digits).str.contains(r"^\d$").all()
    assert len(digits) > 600


@given(st.lists(parts | st.text(max_size=5), max_size=8).map("".join))
def test_a_kind_without_hint_is_not_found_whatever_else_is(text):
    """So rules look only for the kinds whose hints a text has."""
    kinds = [kind for kind in KINDS if hinted(kind, [text])[0]]
    assert redact(text, kinds) == redact(text, KINDS)


@pytest.mark.parametrize(
    "piece", ["a", "a.", "1 ", "1", "+1", "a@", "A1B2 ", "f:", "sk-", "-----BEGIN PRIVATE KEY-----"]
)
def test_hostile_texts_take_linear_time(piece):
    """200,000 characters of what a form could begin with: minutes, if each of them looked at all that follow."""
    started = time.process_time()
    redact(piece * (200_000 // len(piece)), KINDS)
    assert time.process_time() - started < 5
