"""What overlaps with an evaluation set goes, with the evidence; what merely sounds like it stays."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orpo_data.schema import PAIRS
from orpo_data.sources.files import find_files, read_records
from orpo_data.steps.binarize import Binarize
from orpo_data.steps.decontaminate import Decontaminate, Overlap
from orpo_data.steps.evaluation_sets import EvaluationSet, EvaluationSource, read_evaluation_set
from orpo_data.steps.near import normalised
from orpo_data.steps.parse import Parse

LONG = "Please explain to me in some detail how a sailing boat can travel against the wind without an engine."
NINE = "How many pairs of wings does a dragonfly have?"
SHORT = "What is the capital of France?"
ITEMS = [LONG, NINE, SHORT, "?!"]


def evaluation_set(*items: str, name: str = "exam") -> EvaluationSet:
    return EvaluationSet(name, tuple((item,) for item in items), "exam.jsonl")


def row(prompt: str | list[tuple[str, str]], chosen: str = "So.", rejected: str = "No.", subset: str = "x") -> Any:
    turns = [("user", prompt)] if isinstance(prompt, str) else prompt
    return dict.fromkeys(PAIRS.names) | {
        "prompt": [{"role": role, "content": content} for role, content in turns],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "subset": subset,
    }


def verdicts(rows: list[Any], batch: int = 100, **config: Any) -> list[tuple[str, str] | None]:
    """Reason and detail of every row, None where it stays."""
    step = Decontaminate(**{"sets": [evaluation_set(*ITEMS)], **config})
    table = pa.Table.from_pylist([r | {"source_row": i} for i, r in enumerate(rows)], schema=PAIRS)
    outputs = [step.apply(table.slice(start, batch)) for start in range(0, len(table), batch)]
    found = {d["source_row"]: (d["reason"], d["detail"]) for o in outputs for d in o.dropped.to_pylist()}
    kept = [k for output in outputs for k in output.kept["source_row"].to_pylist()]
    assert sorted([*found, *kept]) == list(range(len(rows)))
    return [found.get(i) for i in range(len(rows))]


def verdict(*args: Any, **config: Any) -> tuple[str, str] | None:
    return verdicts([row(*args)], **config)[0]


THIRTEEN = "me in some detail how a sailing boat can travel against the wind"
assert len(THIRTEEN.split()) == 13


@pytest.mark.parametrize(
    ("prompt", "reason", "item", "shared"),
    [
        (LONG, "contaminated_exact", 0, "please explain to me in some detail how a sailing boat can travel against the "
         "wind without an engine"),
        ("what is the CAPITAL\nof france", "contaminated_exact", 2, "what is the capital of france"),
        (" ?!", "contaminated_exact", 3, ""),
        (f"Tell {THIRTEEN.upper()}, friend.", "contaminated_ngram", 0, THIRTEEN),
        (f"So explain to {THIRTEEN}.", "contaminated_ngram", 0, f"explain to {THIRTEEN}"),
        (f"Be brief. {NINE} Say why.", "contaminated_ngram", 1, "how many pairs of wings does a dragonfly have"),
    ],
)  # fmt: skip
def test_contaminated(prompt: str, reason: str, item: int, shared: str) -> None:
    found = verdict(prompt)
    assert found == (reason, f"prompt: exam item {item}; shared: {shared}; question: {ITEMS[item]}")


@pytest.mark.parametrize(
    "prompt",
    [
        THIRTEEN.partition(" ")[2],  # twelve words of a long question
        NINE.rpartition(" ")[0],  # a question of fewer than 13 words counts as a whole
        NINE.replace("dragonfly", "beetle"),
        f"{SHORT} And of Spain?",  # contains a question too short to prove anything
        "What is the capital of Spain?",
        "!?",
        "",
    ],
)
def test_clean(prompt: str) -> None:
    assert verdict(prompt) is None


def test_the_lengths_are_settings() -> None:
    assert verdict(THIRTEEN.partition(" ")[2], ngram=12)
    assert verdict(f"Tell {THIRTEEN}", ngram=14) is None
    assert verdict(f"{SHORT} And of Spain?", min_words=6)
    assert verdict(f"Be brief. {NINE} Say why.", min_words=10) is None
    with pytest.raises(ValidationError, match="min_words \\(9\\) must not be above ngram \\(8\\)"):
        Decontaminate(ngram=8, min_words=9)


def test_runs_do_not_cross_turns() -> None:
    first, second = LONG[: len(LONG) // 2], LONG[len(LONG) // 2 :]
    assert verdict(f"{first}{second}")
    assert verdict([("user", first), ("assistant", "Go on."), ("user", second)]) is None


def test_answers_count_only_if_asked() -> None:
    inside = f"You ask: {LONG}"
    dialogue = [("user", "Hi."), ("assistant", inside), ("user", "Yes.")]
    for prompt, chosen, rejected, side in (
        (dialogue, "So.", "No.", "prompt"),
        ("Hi.", inside, "No.", "chosen"),
        ("Hi.", "So.", inside, "rejected"),
    ):
        assert verdict(prompt, chosen, rejected) is None
        found = verdict(prompt, chosen, rejected, answers=True)
        assert found
        assert found[1].startswith(f"{side}: exam item 0; ")


def test_the_first_set_and_item_are_named_and_exact_ones_before_all() -> None:
    sets = [evaluation_set("Nothing.", f"{NINE} Tell me.", name="a"), evaluation_set(LONG, NINE, name="b")]
    both = verdict(f"{NINE} {LONG} {NINE} Tell me.", sets=sets)
    assert both
    assert both[1].startswith("prompt: a item 1; shared: how many pairs")
    exact = verdict(NINE, sets=[*sets, evaluation_set(NINE, NINE, name="c")])
    assert exact
    assert (exact[0], exact[1].partition(";")[0]) == ("contaminated_exact", "prompt: b item 1")


def test_a_subset_goes_as_a_whole() -> None:
    config = {"subsets": ["truthful_qa"], "sets": []}
    assert verdict("Hi.", "a", "b", "truthful_qa", **config) == ("contaminated_subset", "subset truthful_qa")
    assert verdict("Hi.", "a", "b", "flan", **config) is None


@pytest.mark.parametrize("prompt", [LONG, " ?!", f"So explain to {THIRTEEN}."])
def test_the_detail_can_be_read_again(prompt: str) -> None:
    found = verdict(prompt)
    assert found
    overlap = Overlap.parse(found[1])
    assert overlap
    assert str(overlap) == found[1]
    assert overlap.set_name == "exam"
    assert overlap.question == ITEMS[overlap.item]
    assert Overlap.parse("subset truthful_qa") is None


def test_a_long_question_is_quoted_in_part() -> None:
    item = "word\n" * 4 + "and so on; " * 100
    found = verdict(item, sets=[evaluation_set(item)])
    assert found
    assert len(found[1]) < 600
    assert "question: word word word word and so on; and" in found[1]
    assert "\n" not in found[1]
    assert Overlap.parse(found[1])


def test_the_configuration_tells_the_content_of_a_set_not_its_place() -> None:
    step = Decontaminate(sets=[evaluation_set(*ITEMS)])
    moved = Decontaminate(sets=[EvaluationSet("exam", step.sets[0].items, "elsewhere", "main")])
    other = Decontaminate(sets=[evaluation_set(*ITEMS[:-1])])
    assert step.model_dump(mode="json") == moved.model_dump(mode="json") != other.model_dump(mode="json")
    described = {"name": "exam", "items": 4, "digest": step.sets[0].digest}
    assert step.model_dump(mode="json")["sets"] == [described]
    assert step.facts() == {"evaluation_sets": [described | {"path": "exam.jsonl", "revision": None}]}


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=12)


def naive(prompt: list[str], items: list[list[str]], ngram: int, min_words: int) -> bool:
    """By comparing everything with everything."""

    def runs(text: list[str], length: int) -> set[tuple[str, ...]]:
        return {tuple(text[i : i + length]) for i in range(len(text) - length + 1)}

    return any(
        item
        and (item == prompt or (len(item) >= min_words and runs(item, n := min(ngram, len(item))) & runs(prompt, n)))
        for item in items
    )


@given(
    st.lists(words, max_size=6),
    st.lists(words.filter(bool), max_size=3),
    st.integers(2, 5),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_the_index_finds_what_comparing_everything_finds(
    prompts: list[list[str]], items: list[list[str]], ngram: int, min_words: int, batch: int
) -> None:
    min_words = min(min_words, ngram)
    config = {"sets": [evaluation_set(*map(" ".join, items))], "ngram": ngram, "min_words": min_words}
    found = verdicts([row(" ".join(prompt)) for prompt in prompts], batch, **config)
    assert [bool(verdict) for verdict in found] == [naive(prompt, items, ngram, min_words) for prompt in prompts]
    for prompt, told in zip(prompts, found, strict=True):
        overlap = told and Overlap.parse(told[1])
        if overlap:
            assert f" {overlap.shared} " in f" {' '.join(prompt)} "
            assert f" {overlap.shared} " in f" {' '.join(items[overlap.item])} "


@given(words, words)
def test_sharing_a_run_is_mutual(a: list[str], b: list[str]) -> None:
    """Of two long texts either is the question: the same verdict."""
    a, b = a + ["d"] * 4, b + ["e"] * 4
    there, back = (
        verdict(" ".join(x), sets=[evaluation_set(" ".join(y))], ngram=4, min_words=3) for x, y in ((a, b), (b, a))
    )
    assert bool(there) == bool(back)


def test_truthful_qa_in_the_samples(request: pytest.FixtureRequest) -> None:
    """pipelines/samples: questions of UltraFeedback's subset truthful_qa that stand in other subsets as well."""
    folder = request.config.rootpath / "pipelines/samples/ultrafeedback"
    source = {"path": str(folder / "truthful_qa.jsonl.gz"), "column": "instruction"}
    exam = read_evaluation_set(EvaluationSource(name="truthful_qa", **source))
    assert len(exam.items) == 32
    step = Decontaminate(sets=[exam])
    parsed = [
        Parse(dataset="ultrafeedback").apply(table).kept
        for file in find_files(str(folder), pattern="[!t]*")
        for table in read_records(file, "uf")
    ]
    pairs = [Binarize().apply(table).kept for table in parsed]
    dropped = [row for table in pairs for row in step.apply(table).dropped.to_pylist()]
    assert [(row["source_file"], row["source_row"], row["reason"]) for row in dropped] == [
        ("evol_instruct.jsonl.gz", 12, "contaminated_exact"),
        ("sharegpt.jsonl.gz", 33, "contaminated_exact"),
    ]


def test_real_prompts_against_their_own_pool(real_data: Path) -> None:
    """Half of the prompts as an evaluation set: nothing of the other half is dropped without a quotation of both."""
    (file,) = find_files(str(real_data / "ultrafeedback_binarized"))
    (table,) = (Parse(dataset="pairs").apply(table).kept for table in read_records(file, "uf"))
    half = [row["prompt"][0]["content"] for row in table.slice(0, 350).to_pylist()]
    step = Decontaminate(sets=[evaluation_set(*half)])
    assert len(step.apply(table.slice(0, 350)).kept) == 0
    dropped = step.apply(table.slice(350)).dropped.to_pylist()
    assert 0 < len(dropped) < 60
    for row in dropped:
        overlap = Overlap.parse(row["detail"])
        assert overlap
        assert len(overlap.shared.split()) >= 13
        assert overlap.shared.removesuffix(" ...") in normalised(half[overlap.item])
