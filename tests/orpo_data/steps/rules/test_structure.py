"""Each structural rule on hand-worked pairs: what it finds, on which side, and what it passes."""

import pytest
from pydantic import ValidationError

from orpo_data.steps.clean import Clean
from orpo_data.steps.rules.structure import IdenticalAfterNormalisation, LowMargin, Tie

ROLES = {"S": "system", "U": "user", "A": "assistant"}


def dialogue(*turns: str) -> list[dict[str, str]]:
    """Messages from "U:text"."""
    return [{"role": ROLES[turn[0]], "content": turn[2:]} for turn in turns]


Q = dialogue("U:Q?")
YES, NO = dialogue("A:Yes."), dialogue("A:No.")

BROKEN = [
    ("empty_turn", ["prompt"], dialogue("U: \n\t"), YES, NO),
    ("empty_turn", ["prompt"], dialogue("U:Q?", "A:", "U:Q?"), YES, NO),
    ("empty_turn", ["chosen"], Q, dialogue("A:"), NO),
    ("empty_turn", ["chosen"], Q, dialogue("A:\u00a0\u2003"), NO),  # white space of other alphabets
    ("empty_turn", ["rejected"], Q, YES, dialogue("A: ")),
    ("empty_turn", ["both"], Q, dialogue("A:"), dialogue("A: ")),
    ("empty_turn", ["prompt", "both"], dialogue("U:"), dialogue("A:"), dialogue("A: ")),
    ("empty_turn", ["chosen"], Q, [], NO),
    ("empty_turn", ["rejected"], Q, YES, []),
    ("empty_turn", ["chosen"], Q, dialogue("A:Yes.", "U:", "A:Yes."), NO),
    ("ends_with_human", ["chosen"], Q, dialogue("U:Hm?"), NO),
    ("ends_with_human", ["rejected"], Q, YES, dialogue("A:No.", "U:Why?")),
    ("ends_with_human", ["both"], Q, dialogue("A:Yes.", "U:Sure?"), dialogue("A:No.", "U:Why?")),
    ("ends_with_human", ["rejected"], Q, YES, dialogue("S:No.")),
    ("not_alternating", ["both"], [], YES, NO),
    ("not_alternating", ["both"], dialogue("A:Hello."), YES, NO),
    ("not_alternating", ["both"], dialogue("S:Be kind."), YES, NO),
    ("not_alternating", ["both"], dialogue("U:Q?", "U:Q?"), YES, NO),
    ("not_alternating", ["both"], dialogue("U:Q?", "A:Hm."), YES, NO),
    ("not_alternating", ["both"], dialogue("U:Q?", "S:Be kind."), YES, NO),
    ("not_alternating", ["both"], dialogue("S:One.", "S:Two.", "U:Q?"), YES, NO),
    ("not_alternating", ["chosen"], Q, dialogue("A:Yes.", "A:Really."), NO),
    ("not_alternating", ["rejected"], Q, YES, dialogue("A:No.", "A:Never.")),
    ("diverges_early", ["both"], [], dialogue("U:Q?", "A:B."), dialogue("U:R?", "A:B.")),
    ("diverges_early", ["chosen"], Q, dialogue("A:B.", "U:C?", "A:D."), NO),
    ("diverges_early", ["rejected"], Q, YES, dialogue("A:B.", "U:C?", "A:D.")),
    ("diverges_early", ["both"], Q, dialogue("A:B.", "U:C?", "A:D."), dialogue("A:X.", "U:Y?", "A:Z.")),
    ("identical_pair", ["both"], Q, YES, YES),
]


@pytest.mark.parametrize(("rule", "sides", "prompt", "chosen", "rejected"), BROKEN)
def test_a_broken_pair(judge, rule, sides, prompt, chosen, rejected):
    assert judge(getattr(Clean(), rule), prompt, chosen, rejected) == [(side, side) for side in sides]


HEALTHY = [
    (Q, YES, NO),
    (dialogue("S:Be kind.", "U:Q?"), YES, NO),
    (dialogue("U:A?", "A:B.", "U:C?"), YES, NO),
    (dialogue("S:Be kind.", "U:A?", "A:B.", "U:C?"), YES, NO),
    (Q, dialogue("A:Yes."), dialogue("A:Yes. ")),  # to the letter they differ
    (Q, dialogue("A:."), dialogue("A:0")),
]


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), HEALTHY)
def test_healthy_pairs_pass_all_that_is_on(judge, prompt, chosen, rejected):
    assert [judge(rule, prompt, chosen, rejected) for rule in Clean().rules()] == [[]] * 6


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Yes, it is.", "yes it IS!"),
        ("A  B\n\nC", " a b c "),
        ("caf\u00e9", "cafe\u0301"),  # two Unicode forms of one letter
        ("\uff21\uff22 ok", "ab OK"),  # full-width letters
        ("so\u200bft", "soft"),
        ("“Yes” \u2013 he said…", '"Yes" he said...'),
        ("👍", "👍"),
    ],
)
def test_identical_after_normalisation(judge, chosen, rejected):
    assert judge(IdenticalAfterNormalisation(), "Q?", chosen, rejected) == [("both", "both")]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("now here", "nowhere"),
        ("x < 5", "x > 5"),
        ("-5", "5"),
        ("2 + 2", "2 * 2"),
        ("C#", "C"),
        ("50%", "50"),
        ("!", "?"),
        ("👍", "👎"),
        (":-)", ":-("),
    ],
)
def test_a_sign_can_make_the_difference(judge, chosen, rejected):
    assert judge(IdenticalAfterNormalisation(), "Q?", chosen, rejected) == []


def test_tie(judge):
    assert judge(Tie(), score_chosen=4.5, score_rejected=4.5) == [("both", "both")]


@pytest.mark.parametrize("scores", [(None, None), (4.0, None), (None, 4.0), (5.0, 4.0), (1.0, 4.0)])
def test_unequal_or_missing_scores_are_no_tie(judge, scores):
    assert judge(Tie(), score_chosen=scores[0], score_rejected=scores[1]) == []


@pytest.mark.parametrize(
    ("at_least", "scores", "words"),
    [
        (1, (4.5, 4.0), "0.5 between the scores, at least 1"),
        (1, (4.0, 4.0), "0.0 between the scores, at least 1"),
        (1, (4.0, 5.5), "-1.5 between the scores, at least 1"),
        (0, (4.0, 4.25), "-0.25 between the scores, at least 0"),
    ],
)
def test_low_margin(judge, at_least, scores, words):
    rule = LowMargin(at_least=at_least)
    assert judge(rule, score_chosen=scores[0], score_rejected=scores[1]) == [("both", f"both: {words}")]


@pytest.mark.parametrize("scores", [(5.0, 4.0), (9.0, 1.0), (None, 4.0), (4.0, None), (None, None)])
def test_a_wide_or_unknown_margin(judge, scores):
    assert judge(LowMargin(at_least=1), score_chosen=scores[0], score_rejected=scores[1]) == []


def test_by_default_a_margin_is_low_only_below_zero(judge):
    assert judge(LowMargin(), score_chosen=4, score_rejected=4) == []


@pytest.mark.parametrize("rule", ["empty_turn", "ends_with_human", "not_alternating", "diverges_early"])
@pytest.mark.parametrize("action", ["flag", "off", False, {"action": "flag"}])
def test_what_cannot_be_trained_on_can_only_be_dropped(rule, action):
    with pytest.raises(ValidationError, match=rule + r"[\s\S]*can only be drop: nobody could train on"):
        Clean(**{rule: action})
