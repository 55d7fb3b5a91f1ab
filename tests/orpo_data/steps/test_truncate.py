"""Length limits: whole oldest turns first, never an empty answer, the same prompt on both sides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orpo_data.chat import Chat, find_template
from orpo_data.schema import ENCODED, TOKENIZED
from orpo_data.steps.chat_template import ChatTemplate
from orpo_data.steps.step import StepOutput
from orpo_data.steps.tokenize import Tokenize
from orpo_data.steps.truncate import Truncate

Messages = list[dict[str, str]]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def chat(chat_tokenizer_dir: Path) -> Chat:
    return Chat.load(str(chat_tokenizer_dir))


def fit(chat: Chat, rows: pa.Table, max_length: int, max_prompt_length: int, **config: Any) -> StepOutput:
    encoded = Tokenize(chat=chat).apply(ChatTemplate(chat=chat).apply(rows).kept).kept
    settings = {"overlong_prompt": "drop-turns", "overlong_response": "truncate"} | config
    out = Truncate(chat=chat, max_length=max_length, max_prompt_length=max_prompt_length, **settings).apply(encoded)
    assert len(out.kept) + len(out.dropped) == len(encoded)
    assert out.kept.schema == TOKENIZED
    return out


@pytest.fixture(scope="module")
def fit_one(chat: Chat, make_pairs: Callable[..., pa.Table]) -> Callable[..., Any]:
    """The TOKENIZED row of one pair, or (reason, detail)."""

    def fit_pair(pair: Any, max_length: int, max_prompt_length: int, **config: Any) -> Any:
        out = fit(chat, make_pairs([pair]), max_length, max_prompt_length, **config)
        if len(out.kept):
            return out.kept.to_pylist()[0]
        (dropped,) = out.dropped.to_pylist()
        assert dropped["step"] == "truncate"
        return dropped["reason"], dropped["detail"]

    return fit_pair


def ids_of(chat: Chat, prompt: Messages) -> list[int]:
    ids: list[int] = chat.encode_prompts(pa.array([chat.render_prompt(prompt)]))[0].as_py()
    return ids


def answer_ids(chat: Chat, text: str) -> list[int]:
    ids: list[int] = chat.encode_answers(pa.array([text]))[0].as_py()
    return ids


def test_what_fits_is_left_alone(chat: Chat, make_pair: Callable[..., Any], fit_one: Callable[..., Any]) -> None:
    prompt, chosen, rejected = "How often?", "Twice a week.", "Never."
    ids = ids_of(chat, [{"role": "user", "content": prompt}])
    longest = len(ids) + len(answer_ids(chat, chosen))
    assert fit_one(make_pair(prompt, chosen, rejected, id="x", source="s"), longest, len(ids)) == {
        "id": "x",
        "chosen_input_ids": ids + answer_ids(chat, chosen),
        "rejected_input_ids": ids + answer_ids(chat, rejected),
        "prompt_len": len(ids),
        "source": "s",
        "prompt_turns_dropped": 0,
        "chosen_truncated": False,
        "rejected_truncated": False,
    }


def test_an_answer_one_token_too_long_loses_its_end_of_turn(
    chat: Chat, make_pair: Callable[..., Any], fit_one: Callable[..., Any]
) -> None:
    pair, ids, whole = make_pair("Q?", "Twice a week.", "No."), ids_of(chat, [{"role": "user", "content": "Q?"}]), None
    whole = ids + answer_ids(chat, "Twice a week.")
    row = fit_one(pair, len(whole) - 1, len(ids))
    assert row["chosen_input_ids"] == whole[:-1]
    assert (row["chosen_truncated"], row["rejected_truncated"]) == (True, False)
    assert row["rejected_input_ids"][-1] == chat.end_of_turn_id
    reason, detail = fit_one(pair, len(whole) - 1, len(ids), overlong_response="drop")
    assert reason == "response_too_long"
    assert f"max_length {len(whole) - 1}" in detail


def test_whole_oldest_turns_are_dropped(
    chat: Chat, make_pair: Callable[..., Any], fit_one: Callable[..., Any], turns: Callable[..., Any]
) -> None:
    """User and answer go together: a conversation begins with the user. The system message stays."""
    talk = turns(*(f"{'Answer' if i % 2 else 'Question'} number {i}." for i in range(17)))
    for dropped in range(0, 17, 2):
        ids = ids_of(chat, [SYSTEM, *talk[dropped:]])
        row = fit_one(make_pair([SYSTEM, *talk]), 500, len(ids))
        assert row["prompt_turns_dropped"] == dropped
        assert row["prompt_len"] == len(ids)
        assert row["chosen_input_ids"][: len(ids)] == row["rejected_input_ids"][: len(ids)] == ids
    too_small = len(ids_of(chat, [SYSTEM, *talk[16:]])) - 1
    reason, detail = fit_one(make_pair([SYSTEM, *talk]), 500, too_small)
    assert (reason, detail) == ("prompt_too_long", f"{len(ids_of(chat, [SYSTEM, *talk]))} tokens, at most {too_small}")


def test_each_row_drops_its_own_turns(chat: Chat, make_pairs: Callable[..., Any], make_pair: Any, turns: Any) -> None:
    """A row that needs more turns dropped is done after one that stands behind it."""
    late, early = turns("One two three?", "No.", "Four?", "No. " * 9, "Five?"), turns("Six? " * 9, "Yes.", "Seven?")
    limit = max(len(ids_of(chat, late[4:])), len(ids_of(chat, early[2:])))
    rows = fit(chat, make_pairs([make_pair(late), make_pair(early)]), 500, limit).kept.to_pylist()
    assert [row["prompt_turns_dropped"] for row in rows] == [4, 2]
    for row, prompt in zip(rows, (late[4:], early[2:]), strict=True):
        assert row["chosen_input_ids"][: row["prompt_len"]] == ids_of(chat, prompt)


def test_a_long_prompt_may_cost_the_pair(
    chat: Chat, make_pair: Callable[..., Any], fit_one: Callable[..., Any], turns: Callable[..., Any]
) -> None:
    talk = turns("First?", "Answer.", "Second?")
    limit = len(ids_of(chat, talk)) - 1
    assert fit_one(make_pair(talk), 500, limit)["prompt_turns_dropped"] == 2
    assert fit_one(make_pair(talk), 500, limit, overlong_prompt="drop")[0] == "prompt_too_long"


def test_sides_that_part_behind_the_limit(
    chat: Chat, make_pair: Callable[..., Any], fit_one: Callable[..., Any]
) -> None:
    pair = make_pair("Q?", "Twice a week, in the rain.", "Twice a week, in the sun.")
    prompt = len(ids_of(chat, pair["prompt"]))
    chosen, rejected = answer_ids(chat, "Twice a week, in the rain."), answer_ids(chat, "Twice a week, in the sun.")
    same = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    assert fit_one(pair, prompt + same, prompt)[0] == "identical_after_truncation"
    assert fit_one(pair, prompt + same + 1, prompt)["chosen_truncated"]


def test_a_cut_answer_and_a_whole_one_that_is_its_beginning_differ(
    chat: Chat, make_pair: Callable[..., Any], fit_one: Callable[..., Any]
) -> None:
    """The whole one still has its end of turn, the cut one goes on."""
    pair = make_pair("Q?", "no no no no no no", "no no no")
    prompt, short = len(ids_of(chat, pair["prompt"])), len(answer_ids(chat, "no no no"))
    row = fit_one(pair, prompt + short, prompt)
    assert (row["chosen_truncated"], row["rejected_truncated"]) == (True, False)
    assert fit_one(pair, prompt + short - 1, prompt)[0] == "identical_after_truncation"


def test_a_template_that_refuses_the_shortened_prompt_costs_the_row(
    plain_tokenizer_dir: Path, tmp_path: Path, make_pair: Callable[..., Any], make_pairs: Callable[..., Any], turns: Any
) -> None:
    refuse = "{% if messages[0].content == 'Second?' %}{{ raise_exception('Who are you?') }}{% endif %}"
    (tmp_path / "own.jinja").write_text(refuse + find_template("hh"))
    chat = Chat.load(str(plain_tokenizer_dir), str(tmp_path / "own.jinja"))
    talk = turns("First?", "Answer.", "Second?")
    out = fit(chat, make_pairs([make_pair(talk), make_pair()]), 500, len(ids_of(chat, talk)) - 1)
    assert out.dropped.select(["reason", "detail"]).to_pylist() == [
        {"reason": "refused_by_template", "detail": "Who are you?"}
    ]
    assert len(out.kept) == 1


@pytest.mark.parametrize("spare", [0, -1])
@pytest.mark.parametrize("kept", [2, 4, 6])
def test_a_refused_prompt_costs_no_row_that_needs_it_not(
    chat_tokenizer_dir: Path, tmp_path: Path, make_pair: Callable[..., Any], make_pairs: Any, kept: int, spare: int
) -> None:
    """Whether or not it is rendered together with the one before, which fits or does not."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"{i}?"} for i in range(kept + 3)]
    refuse = f"{{% if messages[0].content == '{kept + 2}?' %}}{{{{ raise_exception('Who are you?') }}}}{{% endif %}}"
    (tmp_path / "own.jinja").write_text(refuse + find_template("chatml"))
    chat = Chat.load(str(chat_tokenizer_dir), str(tmp_path / "own.jinja"))
    out = fit(chat, make_pairs([make_pair(talk)]), 500, len(ids_of(chat, talk[kept:])) + spare)
    assert out.kept["prompt_turns_dropped"].to_pylist() == ([] if spare else [kept])
    assert out.dropped["reason"].to_pylist() == (["refused_by_template"] if spare else [])


def test_a_part_of_a_table(chat: Chat, make_pairs: Callable[..., Any]) -> None:
    table = Tokenize(chat=chat).apply(ChatTemplate(chat=chat).apply(make_pairs(9)).kept).kept
    step = Truncate(
        chat=chat, max_length=30, max_prompt_length=28, overlong_prompt="drop", overlong_response="truncate"
    )
    apart = pa.concat_tables([table.slice(0, 4), table.slice(4, 0), table.slice(4)])
    assert step.apply(apart).kept.equals(step.apply(table).kept)
    assert step.apply(apart.slice(2, 5)).kept.equals(step.apply(table).kept.slice(2, 5))


def test_an_empty_table(chat: Chat) -> None:
    step = Truncate(chat=chat, max_length=9, max_prompt_length=5, overlong_prompt="drop", overlong_response="drop")
    assert len(step.apply(ENCODED.empty_table()).kept) == 0


def why_dropped(
    chat: Chat, pair: Any, max_length: int, max_prompt_length: int, overlong_prompt: str, overlong_response: str
) -> tuple[str, str] | None:
    """Reason and detail, by the rules in words."""
    system, turns = ([SYSTEM], pair["prompt"][1:]) if pair["prompt"][0] is SYSTEM else ([], pair["prompt"])
    starts = range(0, len(turns), 2) if overlong_prompt == "drop-turns" else [0]
    prompts = [len(ids_of(chat, [*system, *turns[start:]])) for start in starts]
    fitting = [length for length in prompts if length <= max_prompt_length]
    if not fitting:
        return "prompt_too_long", f"{prompts[0]} tokens, at most {max_prompt_length}"
    room = max_length - fitting[0]
    chosen, rejected = (answer_ids(chat, pair[side][0]["content"]) for side in ("chosen", "rejected"))
    longest = max(len(chosen), len(rejected))
    if overlong_response == "drop" and longest > room:
        return "response_too_long", f"{longest} tokens, {room} left of max_length {max_length}"
    if chosen[:room] == rejected[:room]:
        return "identical_after_truncation", f"the sides are the same in their first {room} tokens"
    return None


text = st.text("ab \n.é", min_size=1, max_size=40).filter(str.strip)
conversations = st.lists(text, min_size=1, max_size=11).filter(lambda texts: len(texts) % 2 == 1)
pairs = st.lists(st.tuples(conversations, st.booleans(), text, text), min_size=1, max_size=6)


@given(
    pairs,
    st.integers(1, 120),
    st.integers(1, 60),
    st.sampled_from(["drop-turns", "drop"]),
    st.sampled_from(["truncate", "drop"]),
)
def test_every_kept_row_can_be_trained_on(
    chat: Chat,
    make_pair: Callable[..., Any],
    make_pairs: Callable[..., pa.Table],
    turns: Callable[..., Messages],
    drawn: list[Any],
    max_prompt_length: int,
    room: int,
    overlong_prompt: str,
    overlong_response: str,
) -> None:
    assume(all(chosen != rejected for _, _, chosen, rejected in drawn))
    rows = [
        make_pair([SYSTEM] * system + turns(*talk), chosen, rejected, id=str(i), source_row=i)
        for i, (talk, system, chosen, rejected) in enumerate(drawn)
    ]
    max_length = max_prompt_length + room
    config = {"overlong_prompt": overlong_prompt, "overlong_response": overlong_response}
    out = fit(chat, make_pairs(rows), max_length, max_prompt_length, **config)
    for row in out.dropped.to_pylist():
        source = rows[int(row["id"])]
        assert (row["reason"], row["detail"]) == why_dropped(chat, source, max_length, max_prompt_length, **config)
    touched = 0
    for row in out.kept.to_pylist():
        source = rows[int(row["id"])]
        prompt_len, dropped = row["prompt_len"], row["prompt_turns_dropped"]
        system = source["prompt"][:1] if source["prompt"][0] is SYSTEM else []
        expected = ids_of(chat, system + source["prompt"][len(system) + dropped :])
        assert prompt_len == len(expected) <= max_prompt_length
        fewer = source["prompt"][len(system) + dropped - 2 :]
        assert not dropped or len(ids_of(chat, system + fewer)) > max_prompt_length
        for side in ("chosen", "rejected"):
            ids, response = row[f"{side}_input_ids"], answer_ids(chat, source[side][0]["content"])
            assert ids[:prompt_len] == expected
            assert prompt_len < len(ids) <= max_length
            assert ids[prompt_len:] == response[: max_length - prompt_len]
            assert row[f"{side}_truncated"] == (len(response) > max_length - prompt_len)
            assert ids[prompt_len:].count(chat.end_of_turn_id) == (not row[f"{side}_truncated"])
        assert row["chosen_input_ids"] != row["rejected_input_ids"]
        touched += bool(dropped or row["chosen_truncated"] or row["rejected_truncated"])
        assert not (dropped and overlong_prompt == "drop")
    assert out.changed == touched
    parts = [fit(chat, make_pairs([row]), max_length, max_prompt_length, **config) for row in rows]
    assert pa.concat_tables(part.kept for part in parts).equals(out.kept)
    assert pa.concat_tables(part.dropped for part in parts).equals(out.dropped)
