"""Rules that take long look only at rows beyond a quick suspicion: same findings, and ordinary rows are let through."""

from collections.abc import Callable
from functools import partial
from unicodedata import normalize

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.steps.rules import content, folding
from orpo_data.steps.rules.content import PersonalData, Repetition
from orpo_data.steps.rules.folding import folded, same_folded
from orpo_data.steps.rules.rule import only_where

ONE, OTHER = pl.col("one"), pl.col("other")
ORDINARY = (
    "The evening sky is red because the light has a long way to go through the air. Blue light is scattered on the "
    "way, as Rayleigh found in 1871; what is left of it when the sun stands low is red, and more so over dust."
)


# --- only_where ------------------------------------------------------------------------------------------------------


def test_other_rows_are_not_looked_at():
    seen = []
    rows = pl.DataFrame({"a": [1, 2, None, 4]})
    double = pl.col("a").map_elements(lambda a: seen.append(a) or 2 * a, pl.Int64)
    figure = only_where(pl.col("a") > 1, double, [pl.col("a")], pl.Int64())
    assert rows.select(figure)["a"].to_list() == [None, 4, None, 8]
    assert seen == [2, 4]


@pytest.mark.parametrize("rows", [[], [1], [1, 3]])
def test_nothing_is_suspect(rows):
    """Structs too, which polars does not scatter."""
    kind = pl.Struct({"b": pl.Int64})
    figure = only_where(pl.col("a") > 5, pl.struct(b="a"), [pl.col("a")], kind)
    assert pl.DataFrame({"a": rows}, {"a": pl.Int64}).select(figure)["a"].to_list() == [None] * len(rows)


# --- the sieves ------------------------------------------------------------------------------------------------------


@pytest.fixture
def suspects(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[bool]]:
    """Which rows an expression that calls `only_where` would look at."""

    def tell(suspect: pl.Expr, _: pl.Expr, inputs: list[pl.Expr], __: pl.DataType) -> pl.Expr:
        return only_where(pl.first().is_not_null(), suspect, inputs, pl.Boolean())

    def find(measure: Callable[[], pl.Expr], **columns: list[str]) -> list[bool]:
        for module in (content, folding):
            monkeypatch.setattr(module, "only_where", tell)
        return pl.DataFrame(columns).select(measure()).to_series().to_list()

    return find


def test_answers_that_begin_differently_are_not_folded(suspects):
    ones = [ORDINARY, "Yes, it is so.", ORDINARY, "日本語です", "Yes."]
    others = ["I do not know why it is.", "No, it is not.", ORDINARY.upper(), "日本語です", "No."]
    # the last two have no space: their first words are not told apart
    assert suspects(lambda: same_folded(ONE, OTHER), one=ones, other=others) == [False, False, True, True, True]


def test_an_ordinary_answer_does_not_look_repetitive(suspects):
    texts = [ORDINARY, "no " * 30, "no no no"]
    assert suspects(lambda: Repetition().measure("chosen"), chosen_text=texts) == [False, True, False]


def test_ordinary_figures_are_no_personal_data(suspects):
    texts = [ORDINARY, "At 12:30 on 2023-02-16: 1,000 +5 @joe, task-based, a: b", "Mail joe@mail.org"]
    assert suspects(lambda: PersonalData().measure("chosen"), chosen_text=texts) == [False, False, True]


# --- the same findings -----------------------------------------------------------------------------------------------

# letters that compose, decompose, vanish, or turn out differently by what follows
parts = st.sampled_from(
    [
        *("a", "A b ", "c, D", "e\u0301", "\u00e9", "\u0301", "\ufb01", "\uff21", "\uff11", "\u03a3", "\u0391\u03a3 "),
        *("'", "\u200b", "\u00ad", "\u0130", "\u1e9e", "\ud55c", "\u1112", "\u1161", " ", "\n", "\u3000", "\u00a8"),
        *("-", "!", "\u2026", "#", "👍", "日本"),
    ]
)
texts = st.lists(parts, max_size=12).map("".join) | st.text(max_size=8)
long_texts = st.builds(lambda length, end: ORDINARY[:length] + end, st.integers(38, 50), texts)
VARIANTS = [
    *(str, str.upper, str.lower, partial(normalize, "NFC"), partial(normalize, "NFD")),
    *(lambda text: text.replace(" ", "  "), lambda text: f"\u200b{text} !"),
]
PAD = "word " * 9  # 45 characters, and the opening has 48
alike = st.builds(lambda text, change: (text, change(text)), texts | long_texts, st.sampled_from(VARIANTS))


@given(st.lists(alike | st.tuples(texts, texts) | st.tuples(long_texts, long_texts), max_size=6))
@example([(f"{PAD}{a}e\u0301 c", f"{PAD}{a}\u00e9 c") for a in ("", "a", "ab")])
@example([(f"{PAD}{a}\u0391\u03a3'\u03b2 c", f"{PAD}{a}\u03b1\u03c3'\u03b2 c") for a in ("", "a")])
@example([("e \u0301", "e\u0301"), ("ab\u200b c", "ab c"), ("! ", "?")])
def test_texts_are_the_same_as_if_folded(pairs):
    rows = pl.DataFrame(pairs, {"one": pl.String, "other": pl.String}, orient="row")
    assert rows.select(same_folded(ONE, OTHER)).to_series().to_list() == (
        rows.select(folded(ONE) == folded(OTHER)).to_series().to_list()
    )


def share(words: list[str], ngram: int) -> float:
    """1 - distinct-n, in plain Python."""
    ngrams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return 1 - len(set(ngrams)) / len(ngrams)


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "cd", "ab", "é"]), max_size=14), max_size=5),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    st.integers(1, 6),
)
def test_repetition_agrees_with_plain_python(answers, ngram, at_most, least):
    rule = Repetition(ngram=ngram, at_most=at_most, words_at_least=least)
    rows = pl.DataFrame({"chosen_text": [" ".join(words) for words in answers]}, {"chosen_text": pl.String})
    shares = [share(words, ngram) if len(words) >= max(least, ngram) else 0 for words in answers]
    measured = rows.select(rule.measure("chosen")).to_series()
    found = [figure if figure is not None and figure > at_most else None for figure in measured]
    assert found == [pytest.approx(figure) if figure > at_most else None for figure in shares]
