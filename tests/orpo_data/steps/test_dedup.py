"""Of what says the same one row stays, whatever the order; and every row dropped resembles the one kept for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orpo_data.schema import PAIRS, pair_id
from orpo_data.sources.files import find_files, read_records
from orpo_data.steps.clean import Clean
from orpo_data.steps.dedup import Dedup
from orpo_data.steps.parse import Parse

SENTENCE = "Blot it with kitchen paper, never rub, then cover the stain with salt and wait for about ten minutes"


def pair(prompt: str, chosen: str, rejected: str, row: int, margin: float | None = None, source: str = "s") -> Any:
    turns = [[{"role": role, "content": text}] for role, text in
             (("user", prompt), ("assistant", chosen), ("assistant", rejected))]  # fmt: skip
    return dict.fromkeys(PAIRS.names) | {
        "id": pair_id(*turns),
        **dict(zip(("prompt", "chosen", "rejected"), turns, strict=True)),
        "score_chosen": margin,
        "score_rejected": None if margin is None else 0.0,
        "source": source,
        "source_file": "f.jsonl",
        "source_row": row,
    }


@pytest.fixture(scope="session")
def run(run_global: Any) -> Callable[..., tuple[list[Any], list[Any], dict[str, Any]]]:
    """Kept rows, dropped rows and facts of rows that lie in parts of some rows each."""

    def run(rows: list[Any], batch: int = 100, part: int = 100, **config: Any) -> Any:
        table = pa.Table.from_pylist(rows, schema=PAIRS)
        parts = [table.slice(start, part) for start in range(0, max(1, len(rows)), part)]
        out = run_global(Dedup(**config), parts, batch)
        return out.kept.to_pylist(), out.dropped.to_pylist(), out.facts

    return run


def numbers(rows: list[Any]) -> list[int]:
    return [row["source_row"] for row in rows]


# --- hand-worked cases -----------------------------------------------------------------------------------------------

ROW = pair("How?", "So.", "No.", 0)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (pair("How?", "So.", "No.", 1), "duplicate_pair"),
        (pair(" how? ", "SO.", "No.\n", 1), "duplicate_pair"),
        (pair("\uff28ow?", "So.", "No.", 1), "duplicate_pair"),
        (pair("How", "So", "No", 1), "near_duplicate"),  # the same words
        (pair("Who?", "So.", "No.", 1), None),
        (pair("How?", "So.", "Oh.", 1), None),
        (pair("How?", "Oh.", "No.", 1), None),
        (pair("How?", "No.", "So.", 1), "contradiction"),
    ],
)
def test_reasons(run: Any, other: Any, reason: str | None) -> None:
    kept, dropped, _ = run([ROW, other])
    assert [row["reason"] for row in dropped] == ([reason] if reason else []) * (2 if reason == "contradiction" else 1)
    assert numbers(kept) == ([0, 1] if reason is None else [] if reason == "contradiction" else [0])


def test_the_detail_names_the_row_that_stays(run: Any) -> None:
    near = pair("How?", f"{SENTENCE} or so", "No.", 2)  # 17 + 1 + 1 runs of 19 + 1 + 1
    rows = [pair("How?", SENTENCE, "No.", 0), pair("how?", SENTENCE, "No.", 1), near]
    _, dropped, _ = run(rows)
    assert [row["detail"] for row in dropped] == [
        f"of {rows[0]['id']} (row 0 of s f.jsonl)",
        f"of {rows[0]['id']} (similarity 0.90; row 0 of s f.jsonl)",
    ]
    assert [json.loads(row["row"])["source_row"] for row in dropped] == [1, 2]


def test_the_widest_margin_stays_then_the_first_by_origin(run: Any) -> None:
    kept, _, _ = run(
        [pair("How?", "So.", "No.", 0), pair("How?", "So.", "No.", 1, 0.5), pair("How?", "So.", "No.", 2, 2)]
    )
    assert numbers(kept) == [2]
    kept, _, _ = run([pair("How?", "So.", "No.", 9, 1, "a"), pair("How?", "So.", "No.", 1, 1, "b")])
    assert numbers(kept) == [9]
    kept, _, _ = run([pair("How?", "So.", "No.", 9, float("nan")), pair("How?", "So.", "No.", 4)])
    assert numbers(kept) == [4]


def test_of_several_pairs_from_one_record_the_first_id_stays(run: Any) -> None:
    rows = [pair("How?", f"{SENTENCE} {end}", "No.", 0) for end in ("today", "now", "soon", "then")]
    kept, dropped, _ = run(rows)
    assert [row["id"] for row in kept] == [min(row["id"] for row in rows)]
    assert len(dropped) == 3


def test_chains_of_near_duplicates_are_not_followed(run: Any) -> None:
    """b resembles a and c, a and c do not resemble each other: only b goes when a is the best."""
    words = [f"w{i}" for i in range(40)]
    a, b, c = (pair("How?", " ".join(words[i : i + 30]), "No.", row) for row, i in enumerate((0, 5, 10)))
    kept, dropped, _ = run([a, b, c], near=0.7)  # 23 + 2 runs of 33 + 2; between the ends 18 + 2 of 38 + 2
    assert numbers(kept) == [0, 2]
    assert a["id"] in dropped[0]["detail"]
    assert "similarity 0.71" in dropped[0]["detail"]


def test_the_most_similar_row_gets_the_near_duplicate_then_the_best(run: Any) -> None:
    words = [f"w{i}" for i in range(60)]
    a, c, d = (pair("How?", " ".join(words[i : i + 40]), "No.", row, margin) for row, i, margin in
               ((0, 0, 3), (1, 16, 2), (2, 9, 1)))  # fmt: skip
    _, dropped, _ = run([a, c, d], near=0.6)  # 31 of 45 runs of d are a's, 33 of 43 are c's
    assert [(row["source_row"], row["detail"].split()[1]) for row in dropped] == [(2, c["id"])]
    d = pair("How?", " ".join(words[8:48]), "No.", 2, 1)  # as near to both
    _, dropped, _ = run([a, c, d], near=0.6)
    assert [(row["source_row"], row["detail"].split()[1]) for row in dropped] == [(2, a["id"])]


def test_copies_of_a_near_duplicate_follow_it(run: Any) -> None:
    near = f"{SENTENCE} or so"
    rows = [pair("How?", SENTENCE, "No.", 0, 3), pair("How?", near, "No.", 1, 2), pair("how?", near, "NO.", 2, 1)]
    kept, dropped, facts = run(rows)
    assert numbers(kept) == [0]
    assert [row["reason"] for row in dropped] == ["near_duplicate"] * 2
    assert all(rows[0]["id"] in row["detail"] for row in dropped)
    assert facts == {
        "clusters": 1,
        "rows_in_clusters": 3,
        "cluster_sizes": {"3": 1},
        "largest_clusters": [
            {"size": 3, "kept": rows[0]["id"], "dropped": [rows[1]["id"], rows[2]["id"]]}
        ],
    }  # fmt: skip


def test_a_dialogue_cut_at_two_points_is_two_rows(run: Any) -> None:
    """They share a long history and ask something else at the end."""
    long, short = pair(SENTENCE, "So.", "No.", 0), pair(SENTENCE, "So.", "No.", 1)
    long["prompt"] += [{"role": "assistant", "content": SENTENCE}, {"role": "user", "content": "And then?"}]
    short["prompt"] += [{"role": "assistant", "content": SENTENCE}, {"role": "user", "content": "Why is that?"}]
    for on in ("pair", "prompt"):
        assert numbers(run([long, short], on=on, near=0.5)[0]) == [0, 1]


def test_on_the_prompt_alone(run: Any) -> None:
    rows = [pair("How?", "So.", "No.", 0), pair("HOW?", "Thus.", "Never.", 1), pair("How", "A.", "B.", 2)]
    kept, dropped, _ = run(rows, on="prompt")
    assert numbers(kept) == [0]
    assert [row["reason"] for row in dropped] == ["duplicate_prompt", "near_duplicate"]
    assert numbers(run(rows, on="prompt", near=None)[0]) == [0, 2]


def test_what_is_not_asked_for_stays(run: Any) -> None:
    same = [pair("How?", "So.", "No.", 0), pair("how?", "So.", "No.", 1)]
    assert numbers(run(same, exact=False, near=None)[0]) == [0, 1]
    assert [row["reason"] for row in run(same, exact=False)[1]] == ["near_duplicate"]


@pytest.mark.parametrize(
    ("policy", "votes", "kept"),
    [
        ("drop", (2, 1), []),
        ("keep-majority", (2, 1), [0, 1]),
        ("keep-majority", (1, 2), [1, 2]),
        ("keep-majority", (1, 1), []),
        ("keep", (1, 1), [0, 1]),
    ],
)
def test_contradictions(run: Any, policy: str, votes: tuple[int, int], kept: list[int]) -> None:
    rows = [pair("How?", "So.", "No.", i) for i in range(votes[0])]
    rows += [pair("how?", "No.", "so.", votes[0] + i) for i in range(votes[1])]
    left, dropped, _ = run(rows, contradictions=policy, exact=False, near=None)
    assert numbers(left) == kept
    assert {row["reason"] for row in dropped} <= {"contradiction"}
    reversed_order = run(rows[::-1], contradictions=policy, exact=False, near=None)[1][::-1]
    assert [row["detail"] for row in reversed_order] == [row["detail"] for row in dropped]
    for row in dropped:
        mine, other = votes if row["source_row"] < votes[0] else votes[::-1]
        assert f"({mine} for, {other} against; row " in row["detail"]


def test_two_equal_answers_contradict_nothing(run: Any) -> None:
    assert numbers(run([pair("How?", "So.", "so.", 0)])[0]) == [0]


def test_clusters_whose_rows_alternate(run: Any) -> None:
    rows = [pair(("How?", "Who knows?")[i % 2], "So.", "No.", i) for i in range(6)]
    facts = run(rows)[2]
    assert facts["cluster_sizes"] == {"3": 2}
    ids = [row["id"] for row in rows]
    named = [(cluster["kept"], cluster["dropped"]) for cluster in facts["largest_clusters"]]
    assert named == [(ids[0], [ids[2], ids[4]]), (ids[1], [ids[3], ids[5]])]


def test_only_the_largest_clusters_are_named(run: Any) -> None:
    rows = [
        pair(f"Question {i} of {i} is {i}?", "So.", "No.", 100 * i + j) for i in range(25) for j in range(2 + (i == 7))
    ]
    facts = run(rows)[2]
    assert facts["cluster_sizes"] == {"2": 24, "3": 1}
    assert (facts["clusters"], facts["rows_in_clusters"]) == (25, 51)
    assert [cluster["size"] for cluster in facts["largest_clusters"]] == [3] + [2] * 19


def test_an_empty_dataset(run: Any) -> None:
    assert run([])[2] == {"clusters": 0, "rows_in_clusters": 0, "cluster_sizes": {}, "largest_clusters": []}


# --- laws ------------------------------------------------------------------------------------------------------------

words = st.sampled_from(["a", "A", "b", "b c d a", "b c d a d", "b c d a d c"])
drawn = st.lists(
    st.tuples(st.sampled_from(["a b c d", "A b  c d", "b c d"]), words, words, st.sampled_from([None, 0.0, 1.0, 2.0])),
    max_size=14,
)
configs = st.fixed_dictionaries(
    {
        "on": st.sampled_from(["pair", "prompt"]),
        "exact": st.booleans(),
        "near": st.sampled_from([None, 0.5, 0.8]),
        "contradictions": st.sampled_from(["drop", "keep-majority", "keep"]),
    }
)


@settings(max_examples=30)
@given(drawn, configs, st.data())
@example([("b c d", "a", "b", None)] * 3, {}, None)
def test_neither_order_nor_batches_matter_and_once_is_enough(
    run: Any, drawn: list[Any], config: dict[str, Any], data: st.DataObject | None
) -> None:
    rows = [pair(*texts, row, margin) for row, (*texts, margin) in enumerate(drawn)]
    kept, dropped, facts = run(rows, **config)
    verdicts = {row["source_row"]: (row["reason"], row["detail"]) for row in dropped}
    order = data.draw(st.permutations(rows)) if data else rows[::-1]
    batch, part = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 9))) if data else (1, 2)
    _, dropped_again, facts_again = run(order, batch, part, **config)
    assert {row["source_row"]: (row["reason"], row["detail"]) for row in dropped_again} == verdicts
    assert facts_again == facts
    assert numbers(run(kept, **config)[0]) == numbers(kept)
    ids = {row["id"] for row in kept}
    for row in dropped:
        if row["reason"] != "contradiction":
            assert row["detail"].split()[1] in ids


def test_planted_duplicates_of_the_samples(run_global: Any, request: pytest.FixtureRequest) -> None:
    """pipelines/samples/hh_rlhf/DEFECTS.md: a contradiction, an exact copy and a pair with a few words changed."""
    folder = request.config.rootpath / "pipelines/samples/hh_rlhf"
    dropped, _ = dedup_files(run_global, folder)
    found = {(row["reason"], row["source_file"], row["source_row"]) for row in dropped}
    assert {
        ("contradiction", "harmless-base/train.jsonl.gz", 0),
        ("contradiction", "harmless-base/train.jsonl.gz", 33),
        ("duplicate_pair", "helpful-online/train.jsonl.gz", 8),
        ("near_duplicate", "helpful-base/train.jsonl.gz", 42),
    } <= found


def test_real_dialogues(run_global: Any, real_data: Path) -> None:
    """As published they hold no pair twice, but questions of one pattern."""
    dropped, rows = dedup_files(run_global, real_data / "hh_rlhf/helpful-base")
    assert rows > 1500
    assert dropped == []
    dropped, _ = dedup_files(run_global, real_data / "hh_rlhf/helpful-base", on="prompt", near=0.8)
    assert 5 < len(dropped) < 40
    assert {row["reason"] for row in dropped} == {"near_duplicate"}
    assert all(float(row["detail"].split("similarity ")[1][:4]) >= 0.8 for row in dropped)


def dedup_files(run_global: Any, folder: Path, **config: Any) -> tuple[list[Any], int]:
    """Dropped rows, and how many went in."""
    tables = [
        Clean().apply(Parse(dataset="hh-rlhf").apply(table).kept).kept
        for file in find_files(str(folder))
        for table in read_records(file, "hh")
    ]
    return run_global(Dedup(**config), tables).dropped.to_pylist(), sum(map(len, tables))
