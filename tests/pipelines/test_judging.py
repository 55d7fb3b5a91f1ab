"""Answers judged by a reward model: who wins, in whose tokens, and what is refused."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import orpo_data
from orpo_data.chat import find_template
from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from orpo_data.shards import read_table
from orpo_train.evaluate import load_tokenizer
from pipelines.evaluation import EvaluationReport, evaluate_model
from pipelines.judging import Answers, end_of_turn, shown_name, win_rate
from pipelines.reading import Answer, HeldOut, Reader
from pipelines.recipe import EvaluateConfig, JudgeConfig

SEEDS = [1, 5]


@pytest.fixture(scope="session")
def make_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random Llama with a scalar head for the vocabulary of a tokenizer, which lies beside it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    def make(tokenizer_dir: Path, template: str | None = None, weight: float = 1.0) -> Path:
        torch.manual_seed(1)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.chat_template = template or tokenizer.chat_template
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=1,
        )
        model = LlamaForSequenceClassification(config)
        with torch.no_grad():
            model.score.weight.fill_(1).mul_(torch.linspace(-1, 1, 16)).mul_(weight)
        folder = tmp_path_factory.mktemp("reward-model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def reward_model(make_reward_model, chat_tokenizer_dir) -> Path:
    return make_reward_model(chat_tokenizer_dir)


@pytest.fixture(scope="session")
def foreign_reward_model(make_reward_model, plain_tokenizer_dir) -> Path:
    """With another vocabulary, and a template in plain text."""
    return make_reward_model(plain_tokenizer_dir, find_template("alpaca"))


def settings(reward_model: Path, **judge: Any) -> EvaluateConfig:
    usual = {"prompts": 3, "seeds": SEEDS, "max_new_tokens": 6, "reward_model": str(reward_model)}
    return EvaluateConfig(samples=0, judge=JudgeConfig.model_validate(usual | judge))


@pytest.fixture(scope="module")
def judged(trained, prepared, reward_model, tmp_path_factory) -> EvaluationReport:
    output = tmp_path_factory.mktemp("judged") / "evaluate"
    return evaluate_model(trained.path, prepared / "tokenize", output, settings(reward_model))


def held_out(prepared: Path, tokenizer_dir: Path) -> HeldOut:
    dataset = prepared / "tokenize"
    table = read_table(dataset, "eval")
    return HeldOut(dataset, read_manifest(dataset), table, load_tokenizer(tokenizer_dir))


def lines(report: EvaluationReport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (report.path / "answers.jsonl").read_text().splitlines()]


# --- what is told ----------------------------------------------------------------------------------------------------


def test_folder_is_complete_and_sound(judged):
    names = {path.name for path in judged.path.iterdir()}
    assert names >= {"_lineage.ndjson", "_manifest.json", "answers.jsonl", "evaluation.json", "report.html"}
    assert orpo_data.verify(judged.path).ok


def test_win_rate_is_that_of_the_answers_written_down(judged, tiny_model_dir):
    told = judged.result["judge"]
    written = lines(judged)
    assert [(line["id"], line["seed"]) for line in written] == [
        (name, seed) for seed in SEEDS for name in dict.fromkeys(line["id"] for line in written)
    ]
    assert told["prompts"] == 3
    assert told["models"]["against"]["name"] == tiny_model_dir.name
    rates = []
    for number, seed in enumerate(SEEDS):
        mine = [line for line in written if line["seed"] == seed]
        pairs = [(line["model"]["reward"], line["against"]["reward"]) for line in mine]
        rates.append(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))
        assert told["models"]["model"]["rewards"][number] == [a for a, _ in pairs]
    assert told["win_rate"]["seeds"] == pytest.approx(rates)
    assert told["win_rate"]["mean"] == pytest.approx(np.mean(rates))
    assert told["win_rate"]["deviation"] == pytest.approx(np.std(rates, ddof=1))
    lengths = [len(line["model"]["answer"]) for line in written]
    assert told["models"]["model"]["characters"]["mean"] == pytest.approx(np.mean(lengths))
    assert all(map(math.isfinite, told["pairs"]["chosen"]))


def test_rewards_are_those_of_transformers(judged, prepared, reward_model, chat_tokenizer_dir):
    """Of the data's own pairs: the ids as they are, read at their last token."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    rows = orpo_data.load(prepared / "tokenize", split="eval")
    told = judged.result["judge"]
    for side in ("chosen", "rejected"):
        for row, reward in zip(rows, told["pairs"][side], strict=True):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([row[f"{side}_input_ids"]])).logits.item()
            assert reward == pytest.approx(expected, abs=1e-4)
    pairs = zip(told["pairs"]["chosen"], told["pairs"]["rejected"], strict=True)
    assert told["pair_accuracy"] == pytest.approx(np.mean([a > b for a, b in pairs]))


def test_against_itself_all_are_ties(trained, prepared, reward_model, tmp_path):
    asked = settings(reward_model, against=str(trained.path), seeds=[3])
    told = evaluate_model(trained.path, prepared / "tokenize", tmp_path / "e", asked).result["judge"]
    assert (told["win_rate"]["mean"], told["win_rate"]["ties"], told["win_rate"]["deviation"]) == (0.5, 1.0, None)
    assert told["win_rate"]["longer_wins"] is None
    assert told["models"]["model"] | {"name": ""} == told["models"]["against"] | {"name": ""}


def test_models_are_told_apart_where_runs_call_them_all_the_same(tmp_path):
    assert shown_name(tmp_path / "orpo" / "model") == "orpo/model"
    assert shown_name(tmp_path / "SmolLM2") == "SmolLM2"


def test_one_prompt_is_answered_once(judged, prepared, chat_tokenizer_dir):
    data = held_out(prepared, chat_tokenizer_dir)
    twice = HeldOut(data.dataset, data.manifest, data.table.take([0, 0, 1, 2]), data.tokenizer)
    assert twice.prompts(None).ids == data.ids[:3]
    assert twice.prompts(2).ids == data.ids[:2]


def test_how_alike_answers_are(trained, prepared, reward_model, tiny_model_dir, tmp_path):
    asked = settings(reward_model, embedding_model=str(tiny_model_dir))
    told = evaluate_model(trained.path, prepared / "tokenize", tmp_path / "e", asked).result["judge"]
    for model in told["models"].values():
        assert all(-1 <= value <= 1 for value in model["similarity"].values())
        assert all(0 < value <= 1 for value in model["distinct_2"].values())


def test_win_rate_by_hand():
    """First seed: win, tie. Second: win, loss. 0.75 and 0.5. Ours is longer by 2 in all but the last."""
    ours = Answers(
        "a", [[Answer("xxx", None, True, 1)] * 2, [Answer("xxx", None, True, 1), Answer("x", None, True, 1)]]
    )
    theirs = Answers("b", [[Answer("x", None, True, 1)] * 2] * 2)
    rewards = {"model": np.array([[2.0, 1.0], [5.0, 0.0]]), "against": np.ones((2, 2))}
    told = win_rate({"model": ours, "against": theirs}, rewards)
    assert told["seeds"] == [0.75, 0.5]
    assert (told["mean"], told["ties"]) == (0.625, 0.25)
    assert told["deviation"] == pytest.approx(0.125 * math.sqrt(2))
    assert told["longer_wins"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_judging_is_not_done_twice_and_is_done_for_another_judge(judged, trained, prepared, reward_model, tmp_path):
    own = Path(shutil.copytree(judged.path, tmp_path / "evaluate"))
    moved = Path(shutil.copytree(reward_model, tmp_path / "judge-elsewhere"))
    assert not evaluate_model(trained.path, prepared / "tokenize", own, settings(moved)).ran
    other = Path(shutil.copytree(reward_model, tmp_path / "other-judge"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    report = evaluate_model(trained.path, prepared / "tokenize", own, settings(other))
    assert report.ran
    assert "inputs[3]" in report.why


def test_a_folder_in_another_part_is_another_judgement(judged, trained, prepared, reward_model, tmp_path):
    """What was compared with is not what measures likeness, though both are the same bytes."""
    own = Path(shutil.copytree(judged.path, tmp_path / "evaluate"))
    reports = [
        evaluate_model(trained.path, prepared / "tokenize", own, settings(reward_model, **{part: str(trained.path)}))
        for part in ("against", "embedding_model")
    ]
    assert [report.ran for report in reports] == [True, True]


def test_the_judge_is_in_the_lineage(judged, reward_model):
    inputs = read_manifest(judged.path).inputs
    assert [item.name for item in inputs][-1] == reward_model.name
    assert reward_model.name in (judged.path / "_lineage.ndjson").read_text()


def test_same_answers_every_time(judged, trained, prepared, reward_model, tmp_path):
    again = evaluate_model(trained.path, prepared / "tokenize", tmp_path / "e", settings(reward_model))
    for name in ("answers.jsonl", "evaluation.json", "report.html"):
        assert (again.path / name).read_bytes() == (judged.path / name).read_bytes()


# --- whose tokens ----------------------------------------------------------------------------------------------------


def test_a_judge_with_another_tokenizer_reads_the_texts(
    trained, prepared, foreign_reward_model, plain_tokenizer_dir, tmp_path, caplog
):
    """Rewards of the data's chosen answers, by hand from their texts."""
    from transformers import AutoModelForSequenceClassification

    with caplog.at_level(logging.INFO):
        report = evaluate_model(trained.path, prepared / "tokenize", tmp_path / "e", settings(foreign_reward_model))
    assert [r.message for r in caplog.records if "another tokenizer" in r.message] == [
        f"{foreign_reward_model} has another tokenizer: what it judges is tokenized again, in its own chat template"
    ]
    told = report.result["judge"]
    assert told["tokenized_again"]
    tokenizer = load_tokenizer(foreign_reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(foreign_reward_model)
    ids = orpo_data.load(prepared / "tokenize", split="eval")["id"]
    texts = {row["id"]: row for row in orpo_data.load(prepared / "split", split="eval")}
    for name, reward in list(zip(ids, told["pairs"]["chosen"], strict=True))[:3]:
        talk = texts[name]["prompt"] + texts[name]["chosen"]
        text = tokenizer.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
        by_hand = tokenizer(text + talk[-1]["content"].strip())["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([by_hand])).last_hidden_state[0, -1]
        assert reward == pytest.approx(model.score(hidden).item(), abs=1e-4)
    assert "tokenized again" in (report.path / "report.html").read_text()


def test_a_model_reads_the_datas_ids_unless_its_tokenizer_differs(
    prepared, tiny_model_dir, foreign_reward_model, chat_tokenizer_dir, tmp_path
):
    data = held_out(prepared, chat_tokenizer_dir)
    assert Reader.of(tiny_model_dir, data.tokenizer).chat is None
    bare = tmp_path / "bare"
    bare.mkdir()
    assert Reader.of(bare, data.tokenizer).chat is None
    assert Reader.of(foreign_reward_model, data.tokenizer).chat is not None
    other_template = Path(shutil.copytree(chat_tokenizer_dir, tmp_path / "template"))
    (other_template / "chat_template.jinja").write_text(find_template("alpaca"))
    assert Reader.of(other_template, data.tokenizer).chat is not None


def test_a_turn_ends_as_the_template_ends_it_whatever_ends_a_text(prepared, chat_tokenizer_dir, foreign_reward_model):
    """As with Llama 3: the base model ends texts with another token than the template ends turns with."""
    data = held_out(prepared, chat_tokenizer_dir)
    end = data.tokenizer.convert_tokens_to_ids("<|im_end|>")
    data.tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn(Reader(chat_tokenizer_dir, None), data) == {end}
    foreign = Reader.of(foreign_reward_model, data.tokenizer)
    assert end_of_turn(foreign, data) == {foreign.chat.tokenizer.eos_token_id}
    data.tokenizer.chat_template = None
    assert end_of_turn(Reader(chat_tokenizer_dir, None), data) == set()


def test_texts_read_again_give_the_datas_own_ids(prepared, chat_tokenizer_dir):
    """The same tokenizer by way of the texts: shortened prompts, cut answers and all."""
    from orpo_data.chat import Chat

    data = held_out(prepared, chat_tokenizer_dir)
    reader = Reader(chat_tokenizer_dir, Chat.load(str(chat_tokenizer_dir)))
    own = Reader(chat_tokenizer_dir, None)
    assert reader.prompts(data) == own.prompts(data)
    answers = data.answers("chosen")
    whole = [row for row, answer in enumerate(answers) if answer.ended]
    assert whole
    again, known = reader.conversations(data, answers), own.conversations(data, answers)
    assert [again[row] for row in whole] == [known[row] for row in whole]
    elsewhere = [answer._replace(ids=None) for answer in answers]
    assert own.conversations(data, elsewhere) == again


def test_prompts_leave_out_the_turns_that_the_ids_leave_out(make_recipe, chat_tokenizer_dir, tmp_path):
    from orpo_data.chat import Chat
    from pipelines import prepare

    prepare(make_recipe("tokenize.max_prompt_length=45", "split.eval_fraction=0.9"), tmp_path / "run")
    data = held_out(tmp_path / "run", chat_tokenizer_dir)
    assert max(data.table["prompt_turns_dropped"].to_pylist()) > 0
    reader = Reader(chat_tokenizer_dir, Chat.load(str(chat_tokenizer_dir)))
    assert reader.prompts(data) == Reader(chat_tokenizer_dir, None).prompts(data)


def test_an_empty_answer_is_judged_too(prepared, foreign_reward_model, chat_tokenizer_dir):
    data = held_out(prepared, chat_tokenizer_dir).prompts(2)
    reader = Reader.of(foreign_reward_model, data.tokenizer)
    ended, cut = reader.conversations(data, [Answer("", None, True, 1), Answer(" ", None, False, 1)])
    assert ended[:-1] == reader.prompts(data)[0]
    assert cut == reader.prompts(data)[1]


def test_a_model_with_another_tokenizer_is_compared_with(
    trained, prepared, reward_model, tiny_model_dir, plain_tokenizer_dir, tmp_path
):
    from transformers import AutoTokenizer

    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(plain_tokenizer_dir)
    tokenizer.chat_template = find_template("alpaca")
    tokenizer.save_pretrained(other)
    asked = settings(reward_model, against=str(other))
    told = evaluate_model(trained.path, prepared / "tokenize", tmp_path / "e", asked).result["judge"]
    assert told["models"]["against"]["name"] == "other"
    assert not told["tokenized_again"]
    assert all(map(math.isfinite, np.ravel(told["models"]["against"]["rewards"])))


# --- refused, in one line --------------------------------------------------------------------------------------------


def refused(model: Path, dataset: Path, asked: EvaluateConfig, output: Path) -> str:
    with pytest.raises(OrpoError) as caught:
        evaluate_model(model, dataset, output, asked)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    return str(caught.value)


def test_a_judge_that_gives_no_number(trained, prepared, make_reward_model, chat_tokenizer_dir, tmp_path):
    broken = make_reward_model(chat_tokenizer_dir, weight=math.nan)
    told = refused(trained.path, prepared / "tokenize", settings(broken), tmp_path / "e")
    assert told == f"{broken}: the reward model gives sequence 0 the score nan, not a number"


def test_a_judge_of_another_tokenizer_without_a_template(
    trained, prepared, make_reward_model, plain_tokenizer_dir, tmp_path
):
    judge = make_reward_model(plain_tokenizer_dir)
    told = refused(trained.path, prepared / "tokenize", settings(judge), tmp_path / "e")
    assert told.startswith(f"{judge}: its tokenizer is not the dataset's and has no chat template")


def test_a_base_model_of_another_tokenizer_without_a_template(
    trained, prepared, reward_model, tiny_model_dir, plain_tokenizer_dir, tmp_path
):
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    for file in plain_tokenizer_dir.iterdir():
        shutil.copy(file, base)
    told = refused(trained.path, prepared / "tokenize", settings(reward_model, against=str(base)), tmp_path / "e")
    assert told.startswith(f"{base}: its tokenizer is not the dataset's and has no chat template")


def test_a_language_model_is_no_judge(trained, prepared, tiny_model_dir, tmp_path):
    told = refused(trained.path, prepared / "tokenize", settings(tiny_model_dir), tmp_path / "e")
    assert "is no reward model: it lacks score.weight" in told


def test_a_reward_model_answers_nothing(prepared, reward_model, tmp_path):
    told = refused(reward_model, prepared / "tokenize", settings(reward_model), tmp_path / "e")
    assert "is a reward model, which answers no prompts" in told


@pytest.mark.parametrize("what", ["reward_model", "against", "embedding_model"])
def test_a_folder_that_is_not_there(trained, prepared, reward_model, tmp_path, what):
    usual = settings(reward_model).judge.model_dump()
    asked = EvaluateConfig(judge=JudgeConfig(**usual | {what: str(tmp_path / "nowhere")}))
    assert "nowhere: no model folder" in refused(trained.path, prepared / "tokenize", asked, tmp_path / "e")


def test_texts_that_are_gone(trained, own_run, foreign_reward_model, tmp_path):
    shutil.rmtree(own_run / "split")
    told = refused(trained.path, own_run / "tokenize", settings(foreign_reward_model), tmp_path / "e")
    assert "the texts of its rows are needed, and the dataset they lie in (../split) has none of row" in told


# --- the command -----------------------------------------------------------------------------------------------------


def test_command(orpo, trained, prepared, reward_model, tmp_path):
    asked = ("--reward-model", reward_model, "--seeds", "1,5", "--prompts", 3, "--max-new-tokens", 6)
    place = ("--dataset", prepared / "tokenize", "-o", tmp_path / "e")
    done = orpo("evaluate", trained.path, *place, *asked, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["judge"]["win_rate"]["seeds"]
    assert "rewards" not in told["judge"]["models"]["model"]
    text = orpo("evaluate", trained.path, *place, *asked)
    rate = told["judge"]["win_rate"]
    assert f"{100 * rate['mean']:.1f} ± {100 * rate['deviation']:.1f}" in text.out
    assert f"3 prompts, judged by {reward_model.name}" in text.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--against", "x"), "--against is about judged answers: give --reward-model too"),
        (("--reward-model", "x", "--seeds", "1;2"), "--seeds '1;2': whole numbers with commas between them"),
        (("--reward-model", "x", "--seeds", "1,1"), "seeds [1, 1]: each must be a number from 0 and stand once"),
        (("--reward-model", "x", "--temperature", "-1"), "orpo evaluate: temperature: "),
    ],
)
def test_wrong_options(orpo, trained, prepared, options, told):
    done = orpo("evaluate", trained.path, "--dataset", prepared / "tokenize", *options)
    assert done.code == 2
    assert told in done.err
    assert done.err.count("\n") == 1
