"""Nothing held out is also trained on, and no row ever changes sides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orpo_data.schema import PAIRS
from orpo_data.sources.files import find_files, read_records
from orpo_data.steps.near import key_of, prompt_text, shingles
from orpo_data.steps.parse import Parse
from orpo_data.steps.split import Split, opening_text

Messages = list[dict[str, str]]


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="session")
def run(run_global: Any) -> Callable[..., tuple[list[Any], dict[str, Any]]]:
    """Of each prompt its side, or the DROPPED row; and the facts. `sources` has a letter for each prompt."""

    def run(prompts: list[Messages], batch: int = 100, part: int = 100, sources: str = "", **config: Any) -> Any:
        places = [
            {"id": f"id{i}", "source_row": i, "source": letter}
            for i, letter in enumerate(sources or "s" * len(prompts))
        ]
        rows = [dict.fromkeys(PAIRS.names) | place | {"prompt": p} for place, p in zip(places, prompts, strict=True)]
        table = pa.Table.from_pylist(rows, schema=PAIRS)
        parts = [table.slice(start, part) for start in range(0, max(1, len(rows)), part)]
        out = run_global(Split(**({"eval_fraction": 0.5} | config)), parts, batch)
        assert out.kept.schema.names == [*PAIRS.names, "split"]
        found = {row["source_row"]: row["split"] for row in out.kept.to_pylist()}
        dropped = {row["source_row"]: row for row in out.dropped.to_pylist()}
        assert {row["reason"] for row in dropped.values()} <= {"seen_in_train"}
        assert sorted([*found, *dropped]) == list(range(len(rows)))
        return [found.get(i) or dropped[i] for i in range(len(rows))], out.facts

    return run


@pytest.fixture(scope="session")
def sides(run: Any) -> Callable[..., list[str]]:
    """The side of each prompt: train, eval or seen (held out, but train has its like)."""
    return lambda *args, **config: [side if isinstance(side, str) else "seen" for side in run(*args, **config)[0]]


LONG = "Please explain to me in some detail how a sailing boat can travel against the wind without any engine at all"
SAME_SIDE = {
    "the same prompt": (user("How are you?"), user("How are you?")),
    "case, punctuation and spacing": (user("How are you?"), user("  HOW are,\nyou")),
    "no words, the same text": (user("?!"), user("?!")),
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
ALIKE = {
    "a word exchanged": (user(LONG + " today."), user(LONG + " tomorrow.")),
    "a word put in": (user(LONG), user(LONG.replace("some detail", "some more detail"))),
    "the same words in other turns": (user("oak oak oak"), [*user("oak"), {"role": "assistant", "content": "oak oak"}]),
}


@pytest.mark.parametrize("case", SAME_SIDE)
@pytest.mark.parametrize("order", [1, -1])
def test_one_opening_goes_to_one_side(sides: Any, case: str, order: int) -> None:
    drawn = {tuple(sides(list(SAME_SIDE[case])[::order], seed=seed)) for seed in range(40)}
    assert drawn == {("train", "train"), ("eval", "eval")}


@pytest.mark.parametrize("case", ALIKE)
@pytest.mark.parametrize("order", [1, -1])
def test_what_train_has_seen_is_not_held_out(sides: Any, case: str, order: int) -> None:
    drawn = {tuple(sides(list(ALIKE[case])[::order], seed=seed)) for seed in range(60)}
    assert drawn == {("train", "train"), ("eval", "eval"), ("train", "seen"), ("seen", "train")}


def test_the_detail_names_the_most_similar_row_of_train(run: Any) -> None:
    prompts = [user(f"{LONG} {end}") for end in ("today", "tomorrow and then again and again", "tomorrow", "tomorrow")]
    for seed in range(200):
        drawn, _ = run(prompts, seed=seed)
        if isinstance(drawn[0], dict) and drawn[1:] == ["train"] * 3:
            assert drawn[0]["detail"] == "of id2 (similarity 0.90)"  # 19 of 21 runs; ids 2 and 3 are alike
            assert "split" not in drawn[0]["row"]
            return
    pytest.fail("no seed drew these sides")


def test_of_several_as_similar_the_detail_names_the_smallest_id(run: Any) -> None:
    prompts = [user(f"{LONG} {end}") for end in ("today", "tomorrow", "soon")]
    for seed in range(200):
        drawn, _ = run(prompts, seed=seed)
        if isinstance(drawn[0], dict) and drawn[1:] == ["train"] * 2:
            assert drawn[0]["detail"] == "of id1 (similarity 0.90)"
            return
    pytest.fail("no seed drew these sides")


@pytest.mark.parametrize(("a", "b"), [("How old is the oak?", "How old is the elm?"), ("?", "!")])
def test_other_prompts_are_drawn_on_their_own(sides: Any, a: str, b: str) -> None:
    drawn = {tuple(sides([user(a), user(b)], seed=seed)) for seed in range(60)}
    assert drawn == {(x, y) for x in ("train", "eval") for y in ("train", "eval")}


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3])
def test_the_share_held_out(sides: Any, fraction: float) -> None:
    prompts = [user(f"Tell me fact {i} about number {i * i}.") for i in range(1500)]
    held_out = sides(prompts, eval_fraction=fraction).count("eval")
    assert abs(held_out / 1500 - fraction) < 0.04
    assert fraction or held_out == 0


def test_every_source_has_its_share_held_out(run: Any) -> None:
    prompts = [user(f"Tell me fact {i} about number {i * i}.") for i in range(1500)]
    _, facts = run(prompts, sources="aab" * 500, eval_fraction=0.2, eval_fractions={"b": 0.4})
    counts = facts["sources"]
    assert abs(counts["a"]["eval"] / 1000 - 0.2) < 0.05
    assert abs(counts["b"]["eval"] / 500 - 0.4) < 0.07
    assert (counts["a"]["share"], counts["b"]["share"]) == (0.6667, 0.3333)


def test_sources_draw_one_opening_alike(sides: Any) -> None:
    prompts = [user("Hi there."), user("Hi there!")]
    assert {tuple(sides(prompts, sources="ab", seed=seed)) for seed in range(40)} == {("train",) * 2, ("eval",) * 2}


def test_an_opening_that_two_sources_draw_differently(run: Any) -> None:
    """Of a everything is held out that of b is not: then train has it."""
    prompts = [user("Hi there."), [*user("Hi there!"), {"role": "assistant", "content": "Hello."}, *user("Who am I?")]]
    drawn, facts = run(prompts, sources="ab", eval_fraction=0.0, eval_fractions={"a": 0.999999})
    assert (drawn[0]["detail"], drawn[1]) == ("opening of id1", "train")
    assert facts == {
        "sources": {
            "a": {"train": 0, "eval": 0, "seen_in_train": 1, "share": 0.0},
            "b": {"train": 1, "eval": 0, "seen_in_train": 0, "share": 1.0},
        }
    }


def test_the_threshold_is_obeyed(sides: Any) -> None:
    """Nine words of ten shared, 7 of 9 word 3-grams alike."""
    a, b = (user(f"one two three four five six seven eight nine {last}") for last in ("ten", "eleven"))
    shared, either = set(shingles(prompt_text(a))) & set(shingles(prompt_text(b))), 9
    assert len(shared) == 7
    for threshold, dropped in ((7 / either, True), (0.8, False)):
        drawn = {tuple(sides([a, b], near_duplicate=threshold, seed=seed)) for seed in range(40)}
        assert (("train", "seen") in drawn) == dropped
        assert (("train", "eval") in drawn) != dropped


def test_an_empty_dataset(run: Any) -> None:
    drawn, facts = run([])
    assert (drawn, facts) == ([], {"sources": {}})


def jaccard(a: str, b: str) -> float:
    """Of the shingles of two texts; 1 where neither has any."""
    some, others = set(shingles(a)), set(shingles(b))
    return len(some & others) / len(some | others) if some | others else 1.0


words = st.sampled_from(["oak", "elm", "ash", "fir", "yew", "box", "bay", "fig"])
prompt = st.lists(words, min_size=1, max_size=6).map(" ".join)
conversation = st.lists(prompt, min_size=1, max_size=3).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
fractions = st.sampled_from([{}, {"a": 0.2}])


@settings(max_examples=25)
@given(st.lists(st.tuples(conversation, st.sampled_from("ab")), max_size=25), fractions, st.integers(0, 5), st.data())
@example([(user("oak"), "a"), ([*user("oak"), *user("elm")], "b")], {"a": 0.2}, 0, None)
def test_the_sides_have_nothing_in_common_in_any_order(
    sides: Any, rows: list[Any], fractions: dict[str, float], seed: int, data: st.DataObject | None
) -> None:
    prompts, sources = [row[0] for row in rows], "".join(row[1] for row in rows)
    drawn = sides(prompts, sources=sources, seed=seed, eval_fractions=fractions)
    train, held_out = ([p for p, side in zip(prompts, drawn, strict=True) if side == s] for s in ("train", "eval"))
    assert not {key_of(opening_text(p)) for p in train} & {key_of(opening_text(p)) for p in held_out}
    for a in train:
        for b in held_out:
            texts = prompt_text(a), prompt_text(b)
            assert key_of(texts[0]) != key_of(texts[1])
            assert jaccard(*texts) < 0.7
    if data and rows:
        order = data.draw(st.permutations(range(len(rows))))
        shuffled = sides(
            [prompts[i] for i in order],
            *data.draw(st.tuples(st.integers(1, 7), st.integers(1, 9))),
            sources="".join(sources[i] for i in order),
            seed=seed,
            eval_fractions=fractions,
        )
        assert [drawn[i] for i in order] == shuffled


@settings(max_examples=25)
@given(st.lists(conversation, max_size=15), st.lists(conversation, max_size=15), st.integers(0, 5), st.booleans())
def test_more_rows_move_no_row_to_the_other_side(
    sides: Any, old: list[Any], new: list[Any], seed: int, first: bool
) -> None:
    """Train stays train; held out stays held out, or is dropped; dropped stays dropped."""
    before = sides(old, seed=seed)
    after = sides([*new, *old], seed=seed)[len(new) :] if first else sides([*old, *new], seed=seed)[: len(old)]
    allowed = {("train", "train"), ("eval", "eval"), ("eval", "seen"), ("seen", "seen")}
    assert set(zip(before, after, strict=True)) <= allowed


def test_near_duplicates_of_real_prompts_are_never_held_out(sides: Any, real_data: Path) -> None:
    """A word put before the last one of a long prompt leaves nearly all its word 3-grams."""
    (file,) = find_files(str(real_data / "hh_rlhf/harmless-base/test.jsonl.gz"))
    tables = [Parse(dataset="hh-rlhf").apply(table).kept for table in read_records(file, "hh", 1000)]
    prompts = [p for table in tables for p in table["prompt"].to_pylist() if len(set(shingles(prompt_text(p)))) > 40][
        :300
    ]
    assert len(prompts) == 300
    drawn = sides(prompts + [_with_a_word_more(p) for p in prompts])
    pairs = list(zip(drawn[:300], drawn[300:], strict=True))
    assert set(pairs) <= {("train", "train"), ("eval", "eval"), ("train", "seen"), ("seen", "train"), ("seen", "seen")}
    assert 40 < pairs.count(("eval", "eval")) < 110


def _with_a_word_more(prompt: Messages) -> Messages:
    """The opening turn changes too, so that it is not what links the two."""
    first, last = prompt[0], prompt[-1]["content"].split(" ")
    changed = {"role": "user", "content": f"Well: {first['content']}"}
    return [changed, *prompt[1:-1], {"role": "user", "content": " ".join([*last[:-1], "perhaps", last[-1]])}]
