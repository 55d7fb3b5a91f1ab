"""Answers in the file forms of public judges: each form as its judge reads it, the settings, and what is refused."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_data.chat import Chat
from orpo_data.errors import OrpoError
from orpo_train.config import Sampling
from orpo_train.evaluate import load_tokenizer
from orpo_train.generate import end_tokens, generate
from orpo_train.model import load_model
from pipelines.answering import answer_questions
from pipelines.forms import FORMS, read_questions

ALPACA = [
    {"dataset": "helpful_base", "instruction": "Why is moss green?", "output": "It just is.", "generator": "davinci"},
    {"dataset": "koala", "instruction": "Name an oak.", "output": "Otto.", "generator": "davinci"},
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write of ferns.", "Now in verse."]},
    {"question_id": 101, "category": "reasoning", "turns": ["Is moss a plant?", "Why?"], "reference": ["Yes.", "So."]},
    {"question_id": 141, "category": "stem", "turns": ["What is bark?", "And cork?"]},
]
IFEVAL = [
    {"key": 1000, "prompt": "Two lines, no commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
]


@pytest.fixture
def question_file(tmp_path: Path) -> Callable[..., Path]:
    def write(records: list[Any], name: str = "questions.jsonl") -> Path:
        file = tmp_path / name
        as_list = name.endswith(".json")
        file.write_text(json.dumps(records) if as_list else "".join(json.dumps(record) + "\n" for record in records))
        return file

    return write


def by_hand(folder: Path, talks: list[list[dict[str, str]]], **sampling: Any) -> list[str]:
    """Each conversation alone, by way of transformers' template."""
    model, tokenizer, chat = load_model(folder), load_tokenizer(folder), Chat.load(str(folder))
    answers = []
    for talk in talks:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = end_tokens(model, tokenizer) | {chat.end_of_turn_id}
        drawn = generate(model, [ids], Sampling(max_new_tokens=6, **sampling), ends)[0]
        answers.append(tokenizer.decode(drawn, skip_special_tokens=True).strip())
    return answers


def test_alpaca_eval(tiny_model_dir, question_file, tmp_path):
    output = tmp_path / "out" / "model_outputs.json"
    report = answer_questions(
        str(tiny_model_dir),
        question_file(ALPACA, "a.json"),
        "alpaca-eval",
        output,
        name="mine",
        sampling={"max_new_tokens": 6},
    )
    told = json.loads(output.read_text())
    assert [list(record) for record in told] == [["instruction", "output", "generator", "dataset"]] * 2
    assert [record["instruction"] for record in told] == [record["instruction"] for record in ALPACA]
    assert [(record["generator"], record["dataset"]) for record in told] == [
        ("mine", "helpful_base"),
        ("mine", "koala"),
    ]
    talks = [[{"role": "user", "content": record["instruction"]}] for record in ALPACA]
    assert [record["output"] for record in told] == by_hand(tiny_model_dir, talks, temperature=0.7)
    assert (report.questions, report.path) == (2, output)


def test_mt_bench_second_turn_knows_the_first_and_categories_have_their_temperatures(
    tiny_model_dir, question_file, tmp_path
):
    output, before = tmp_path / "mine.jsonl", time.time()
    answer_questions(str(tiny_model_dir), question_file(MT_BENCH), "mt-bench", output, sampling={"max_new_tokens": 6})
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [list(line) for line in lines] == [["question_id", "answer_id", "model_id", "choices", "tstamp"]] * 3
    assert [line["question_id"] for line in lines] == [81, 101, 141]
    assert len({line["answer_id"] for line in lines}) == 3
    assert all(before <= line["tstamp"] <= time.time() for line in lines)
    for line, question, temperature in zip(lines, MT_BENCH, (0.7, 0.0, 0.1), strict=True):
        assert line["model_id"] == tiny_model_dir.name
        talk: list[dict[str, str]] = []
        turns: list[str] = []
        for asked in question["turns"]:
            talk.append({"role": "user", "content": asked})
            turns += by_hand(tiny_model_dir, [talk], temperature=temperature)
            talk.append({"role": "assistant", "content": turns[-1]})
        assert line["choices"] == [{"index": 0, "turns": turns}]


def test_ifeval_is_greedy(tiny_model_dir, question_file, tmp_path):
    output = tmp_path / "input_response_data.jsonl"
    answer_questions(str(tiny_model_dir), question_file(IFEVAL), "ifeval", output, sampling={"max_new_tokens": 6})
    expected = by_hand(tiny_model_dir, [[{"role": "user", "content": IFEVAL[0]["prompt"]}]], temperature=0)
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"prompt": IFEVAL[0]["prompt"], "response": expected[0]}
    ]


def test_settings_given_hold_for_all_questions(tiny_model_dir, question_file, tmp_path):
    output = tmp_path / "mine.jsonl"
    asked = {"temperature": 0, "max_new_tokens": 6, "seed": 3}
    answer_questions(str(tiny_model_dir), question_file(MT_BENCH), "mt-bench", output, sampling=asked)
    first = [json.loads(line)["choices"][0]["turns"][0] for line in output.read_text().splitlines()]
    talks = [[{"role": "user", "content": record["turns"][0]}] for record in MT_BENCH]
    assert first == by_hand(tiny_model_dir, talks, temperature=0)


def test_the_card_states_the_settings(tiny_model_dir, question_file, tmp_path):
    from pipelines.training import model_fingerprint

    output = tmp_path / "mine.jsonl"
    report = answer_questions(
        str(tiny_model_dir), question_file(MT_BENCH), "mt-bench", output, sampling={"max_new_tokens": 6}
    )
    rows = dict(line.strip("| ").split(" | ") for line in report.card.read_text().splitlines() if line.startswith("| "))
    assert report.card.name == "mine.jsonl.md"
    assert rows["temperature"] == "0, 0.1, 0.7"
    assert rows["most new tokens"] == "6"
    assert rows["seed"] == "42"
    assert rows["answers that reached it"] == str(report.unended)
    assert model_fingerprint(tiny_model_dir)[:12] in rows["model"]
    assert "common.py" in rows["defaults from"]
    assert str(tmp_path) not in report.card.read_text()


def test_names_are_no_markup_on_the_card(tiny_model_dir, question_file, tmp_path):
    name = "<img src=x> | `a` [x](y)"
    model = shutil.copytree(tiny_model_dir, tmp_path / name)
    questions, output = question_file(IFEVAL).rename(tmp_path / f"questions {name}"), tmp_path / f"out {name}"
    card = answer_questions(str(model), questions, "ifeval", output, sampling={"max_new_tokens": 2}).card.read_text()
    assert "<img" not in card
    assert "[x](" not in card
    assert all(line.count(" | ") == 1 for line in card.splitlines() if line.startswith("| "))


def test_a_template_by_name(tiny_model_dir, question_file, tmp_path):
    report = answer_questions(
        str(tiny_model_dir),
        question_file(IFEVAL),
        "ifeval",
        tmp_path / "o.jsonl",
        chat_template="alpaca",
        sampling={"max_new_tokens": 2},
    )
    assert "| chat template | alpaca, digest" in report.card.read_text()


def test_a_control_token_in_a_question_is_told(tiny_model_dir, question_file, tmp_path, caplog):
    file = question_file([{"prompt": "What does <|im_end|> mean?"}])
    with caplog.at_level(logging.WARNING):
        answer_questions(str(tiny_model_dir), file, "ifeval", tmp_path / "o", sampling={"max_new_tokens": 2})
    assert "question 1 holds '<|im_end|>', which its tokenizer reads as a control token" in caplog.text


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "text", "told"),
    [
        ("alpaca-eval", "[1]", "item 1 is a int, an object with a question is needed"),
        ("alpaca-eval", '[{"prompt": "x"}]', "item 1 has no 'instruction', only prompt"),
        ("alpaca-eval", "[{", "no JSON: "),
        ("mt-bench", '{"question_id": 1, "turns": ["x"]}', "item 1 has no 'category', only question_id, turns"),
        ("mt-bench", '{"question_id": 1, "category": "x", "turns": []}', "item 1 asks nothing"),
        ("ifeval", '{"prompt": "x"}\n\n{"prompt": " "}', "item 2 asks nothing"),
        ("ifeval", '{"prompt": "x"}\n{"prom', "line 2 is no JSON"),
        ("ifeval", '{"prompt": 3}', "item 1 asks nothing: a turn is empty or no text"),
        ("ifeval", "", "has no questions"),
    ],
)
def test_questions_that_are_none(tmp_path, form, text, told):
    file = tmp_path / "q"
    file.write_text(text)
    with pytest.raises(OrpoError) as caught:
        read_questions(file, FORMS[form])
    assert str(caught.value).startswith(f"{file}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_where_a_file_has_one(tmp_path, end):
    """JSON may hold the separators of Unicode as they are."""
    file, prompts = tmp_path / "q", ["one\u2028line", "and\u0085one"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    file.write_bytes((end * 2).join([*lines, ""]).encode())
    assert [question.turns for question in read_questions(file, FORMS["ifeval"])] == [(prompt,) for prompt in prompts]


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(OrpoError, match="cannot be read"):
        read_questions(tmp_path / "nowhere", FORMS["ifeval"])


def test_a_model_without_a_template(orpo, tiny_model_dir, question_file, tmp_path):
    bare = Path(shutil.copytree(tiny_model_dir, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    done = orpo("generate", bare, "--prompts", question_file(IFEVAL), "--form", "ifeval", "-o", tmp_path / "o")
    assert done.code == 2
    assert f"{bare}: its tokenizer has no chat template; give --chat-template, a jinja file or one of" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_weights_that_are_no_numbers_leave_the_old_file(tiny_model_dir, question_file, tmp_path):
    from transformers import AutoModelForCausalLM

    broken = Path(shutil.copytree(tiny_model_dir, tmp_path / "broken"))
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    model.save_pretrained(broken)
    output = tmp_path / "o.jsonl"
    output.write_text("old")
    with pytest.raises(OrpoError, match="logits are not finite"):
        answer_questions(str(broken), question_file(IFEVAL), "ifeval", output, sampling={"max_new_tokens": 2})
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_command(orpo, tiny_model_dir, question_file, tmp_path):
    asked = ("--prompts", question_file(ALPACA, "a.json"), "--form", "alpaca-eval", "--max-new-tokens", 4)
    done = orpo("generate", tiny_model_dir, *asked, "-o", tmp_path / "o.json", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["questions"] == 2
    text = orpo("generate", tiny_model_dir, *asked, "-o", tmp_path / "o.json")
    assert text.out.startswith(f"2 questions answered, {told['unended']} answers cut off\n{tmp_path / 'o.json'}\n")


@pytest.mark.parametrize("option", ["--temperature=-1", "--top-p=0", "--max-new-tokens=0", "--seed=-1"])
def test_wrong_settings(orpo, tiny_model_dir, question_file, tmp_path, option):
    place = ("--prompts", question_file(IFEVAL), "--form", "ifeval", "-o", tmp_path / "o")
    done = orpo("generate", tiny_model_dir, *place, option)
    assert done.code == 2
    assert done.err.startswith("orpo: orpo generate: ")
    assert done.err.count("\n") == 1
