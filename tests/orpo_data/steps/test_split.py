"""Nothing held out is also trained on, and a row's side is its own."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.schema import PAIRS
from orpo_data.sources.files import find_files, read_records
from orpo_data.steps.parse import Parse
from orpo_data.steps.split import Split, key_of, normalised, opening_text, prompt_text, shingles

Messages = list[dict[str, str]]


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def sides(prompts: list[Messages], batch: int = 100, **config: Any) -> list[str]:
    """The side of each prompt."""
    rows = [dict.fromkeys(PAIRS.names) | {"prompt": prompt, "source_row": i} for i, prompt in enumerate(prompts)]
    table = pa.Table.from_pylist(rows, schema=PAIRS)
    batches = [table.slice(start, batch) for start in range(0, max(1, len(rows)), batch)]
    step = Split(**({"eval_fraction": 0.5} | config)).summarise(iter(batches))
    outputs = [step.apply(part) for part in batches]
    assert all(len(output.dropped) == 0 for output in outputs)
    kept = pa.concat_tables(output.kept for output in outputs)
    assert kept["source_row"].to_pylist() == list(range(len(rows)))
    assert kept.schema.names == [*PAIRS.names, "split"]
    return kept["split"].to_pylist()


LONG = "Please explain to me in some detail how a sailing boat can travel against the wind without any engine at all"
LINKED = {
    "the same prompt": (user("How are you?"), user("How are you?")),
    "case, punctuation and spacing": (user("How are you?"), user("  HOW are,\nyou")),
    "no words, the same text": (user("?!"), user("?!")),
    "near duplicates": (user(LONG + " today."), user(LONG + " tomorrow.")),
    "near duplicates, a word put in": (user(LONG), user(LONG.replace("some detail", "some more detail"))),
    "a dialogue cut at two points": (
        user("Hi, tell me of Rome."),
        [*user("Hi, tell me of Rome."), {"role": "assistant", "content": "Old."}, *user("And the Forum?")],
    ),
    "openings alike but for case and punctuation": (
        user("Hi there."),
        [
            *user("hi THERE!"),
            {"role": "assistant", "content": "Hello."},
            *user("Where does the Nile begin, and where end?"),
        ],
    ),
    "the same opening under another system message": (
        [{"role": "system", "content": "Be brief."}, *user("Hi there.")],
        [{"role": "system", "content": "Be a pirate, and a loud one at that."}, *user("Hi there.")],
    ),
}


@pytest.mark.parametrize("case", LINKED)
@pytest.mark.parametrize("order", [1, -1])
def test_linked_prompts_go_to_one_side(case: str, order: int) -> None:
    drawn = {tuple(sides(list(LINKED[case])[::order], seed=seed)) for seed in range(40)}
    assert drawn == {("train", "train"), ("eval", "eval")}


def test_the_same_words_cut_into_other_turns_link_both_openings() -> None:
    """The third prompt has the words of the first and the opening of the second, so all three go together."""
    answered = [*user("oak"), {"role": "assistant", "content": "oak oak"}]
    drawn = {tuple(sides([user("oak oak oak"), user("oak"), answered], seed=seed)) for seed in range(40)}
    assert drawn == {("train",) * 3, ("eval",) * 3}


def test_a_chain_of_links_is_one_group() -> None:
    """The first and the last share nothing but what lies between."""
    a, c = user("Hi."), [*user(LONG), {"role": "assistant", "content": "By tacking."}, *user("Thanks. And a kite?")]
    b = [*user("Hi."), {"role": "assistant", "content": "Hello."}, *user("Bye.")]
    d = user(LONG + " again.")
    for seed in range(40):
        one, two, three, four, five = sides([a, c, b, d, user(LONG)], seed=seed)
        assert one == three
        assert two == four == five


@pytest.mark.parametrize(("a", "b"), [("How old is the oak?", "How old is the elm?"), ("?", "!")])
def test_other_prompts_are_drawn_on_their_own(a: str, b: str) -> None:
    drawn = {tuple(sides([user(a), user(b)], seed=seed)) for seed in range(60)}
    assert len(drawn) == 4


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3])
def test_the_share_held_out(fraction: float) -> None:
    held_out = sides(
        [user(f"Tell me fact {i} about number {i * i}.") for i in range(1500)], eval_fraction=fraction
    ).count("eval")
    assert abs(held_out / 1500 - fraction) < 0.04
    assert fraction or held_out == 0


def test_the_threshold_is_obeyed() -> None:
    """Nine words of ten shared, 6 of 10 word 3-grams alike: one group at 0.5, two at 0.9."""
    a, b = (
        user("one two three four five six seven eight nine ten"),
        user("one two three four five six seven eight nine eleven"),
    )
    shared = set(shingles(a[0]["content"])) & set(shingles(b[0]["content"]))
    either = set(shingles(a[0]["content"])) | set(shingles(b[0]["content"]))
    assert len(shared) / len(either) == 7 / 9
    assert {tuple(sides([a, b], near_duplicate=0.5, seed=seed)) for seed in range(40)} == {
        ("train",) * 2,
        ("eval",) * 2,
    }
    assert len({tuple(sides([a, b], near_duplicate=0.95, seed=seed)) for seed in range(60)}) == 4


def test_an_empty_dataset() -> None:
    assert sides([]) == []


words = st.sampled_from(["oak", "elm", "ash", "fir", "yew", "box", "bay", "fig"])
prompt = st.lists(words, min_size=1, max_size=6).map(" ".join)
conversation = st.lists(prompt, min_size=1, max_size=3).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)


@given(st.lists(conversation, max_size=25), st.integers(0, 5), st.data())
@example([user("oak"), [*user("oak"), *user("elm")]], 0, None)
def test_sides_share_no_prompt_and_no_opening_in_any_order(
    prompts: list[Messages], seed: int, data: st.DataObject | None
) -> None:
    drawn = sides(prompts, seed=seed)
    for key in (lambda p: key_of("\n".join(turn["content"] for turn in p)), lambda p: key_of(opening_text(p))):
        seen: dict[str, str] = {}
        assert all(seen.setdefault(key(p), side) == side for p, side in zip(prompts, drawn, strict=True))
    order = data.draw(st.permutations(range(len(prompts)))) if data else []
    batch = data.draw(st.integers(1, 7)) if data else 1
    if order:
        shuffled = sides([prompts[i] for i in order], batch=batch, seed=seed)
        assert [drawn[i] for i in order] == shuffled


@given(st.lists(st.integers(0, 10_000), unique=True, min_size=1, max_size=20), st.integers(0, 5))
def test_more_rows_leave_unrelated_rows_where_they_were(numbers: list[int], seed: int) -> None:
    prompts = [user(f"fact{n} of{n} number{n}") for n in numbers]
    others = [user(f"poem{n} on{n} day{n}") for n in range(10)]
    assert sides([*others, *prompts], seed=seed)[len(others) :] == sides(prompts, seed=seed)


def test_near_duplicates_of_real_prompts_go_together(real_data: Path) -> None:
    """A word put before the last one of a long prompt leaves nearly all its word 3-grams."""
    (file,) = find_files(str(real_data / "hh_rlhf/harmless-base/test.jsonl.gz"))
    tables = [Parse(dataset="hh-rlhf").apply(table).kept for table in read_records(file, "hh", 1000)]
    prompts = [p for table in tables for p in table["prompt"].to_pylist() if len(set(shingles(prompt_text(p)))) > 40][
        :300
    ]
    assert len(prompts) == 300
    drawn = sides(prompts + [_with_a_word_more(p) for p in prompts])
    assert drawn[:300] == drawn[300:]
    assert 90 < drawn[:300].count("eval") < 210


def _with_a_word_more(prompt: Messages) -> Messages:
    """The opening turn changes too, so that it is not what links the two."""
    first, last = prompt[0], prompt[-1]["content"].split(" ")
    changed = {"role": "user", "content": f"Well: {first['content']}"}
    return [changed, *prompt[1:-1], {"role": "user", "content": " ".join([*last[:-1], "perhaps", last[-1]])}]


def test_normalised_keeps_words_alone() -> None:
    assert normalised("  Ein GROSSER  Straße-Test!\n") == "ein grosser strasse test"
