"""IFEval's rules on answers: shares by hand, the same each time, and what cannot be checked."""

import json
from typing import Any

import pytest

from orpo_data.errors import OrpoError, UsageError
from pipelines import ifeval
from pipelines.forms import FORMS, Question
from pipelines.ifeval import check_answers

NO_COMMA, LOWER, QUOTED = "punctuation:no_comma", "change_case:english_lowercase", "startend:quotation"


def question(*names: str, **record: Any) -> Question:
    usual = {
        "key": 7,
        "prompt": "Go.",
        "instruction_id_list": list(names),
        "kwargs": [{"num_words": None}] * len(names),
    }
    return FORMS["ifeval"].question(usual | record)


def test_shares_by_hand():
    """Strictly 1 + 1 + 0 + 0 of 1 + 2 + 1 + 1 instructions, one prompt of four whole.

    The third answer's comma lies in its first line, which loose checking leaves out.
    """
    questions = [question(NO_COMMA), question(NO_COMMA, QUOTED), question(NO_COMMA), question(NO_COMMA)]
    told = check_answers(questions, ["no comma", "none either", "well, yes:\nall right", ""])
    assert (told.prompt_strict, told.prompt_loose) == (0.25, 0.5)
    assert told.instruction_strict == pytest.approx(2 / 5)
    assert told.instruction_loose == pytest.approx(3 / 5)


def test_the_language_is_found_the_same_each_time():
    unsure = [question(LOWER)] * 8
    assert len({check_answers(unsure, ["la moss est green in der wald"] * 8) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (question("no:such"), r"question 1 \(key 7\): 'no:such' is no instruction of IFEval"),
        (question(), r"question 1 \(key 7\): has no instruction_id_list"),
        (question(NO_COMMA, kwargs=[]), r"question 1 \(key 7\): has no instruction_id_list with as many kwargs"),
    ],
)
def test_what_cannot_be_checked(wrong, told):
    with pytest.raises(OrpoError, match=told):
        check_answers([wrong], ["An answer."])


def test_sentences_need_data_that_is_fetched_by_hand(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    asked = question(
        "change_case:capital_word_frequency", kwargs=[{"capital_frequency": 1, "capital_relation": "at least"}]
    )
    with pytest.raises(OrpoError, match=r"python -m nltk\.downloader punkt_tab") as caught:
        check_answers([asked], ["YES. No."])
    assert "\n" not in str(caught.value)


def test_command(orpo, tiny_model_dir, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(question(NO_COMMA).record) + "\n")
    asked = ("generate", tiny_model_dir, "--prompts", file, "--max-new-tokens", 4, "-o", tmp_path / "o", "--check")
    done = orpo(*asked, "--form", "ifeval", "--json")
    assert done.code == 0, done.err
    shares = json.loads(done.out)["followed"]
    assert set(shares) == {"prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"}
    assert f"| followed, prompt, strict | {100 * shares['prompt_strict']:.2f} % |" in (tmp_path / "o.md").read_text()
    assert "instruction, loose: " in orpo(*asked, "--form", "ifeval").out
    other = orpo(*asked, "--form", "alpaca-eval")
    assert (other.code, other.err) == (2, "orpo: --check: there are rules for ifeval alone, not for alpaca-eval\n")


def test_rules_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("orpo_data.extras.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"--check: needs the package if_verifiable: pip install 'orpo-pipeline\[ifeval\]'"
    ):
        ifeval.require_rules()
