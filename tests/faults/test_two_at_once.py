"""Two at once: one waits or is told who the other is; never a mixed result."""

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import orpo_data
from orpo_data.shards import read_table
from pipelines import stages

REFUSED = re.compile(r"orpo: \S+: is being written by process (\d+) on \S+ \(orpo \w+, since \S+\); wait for it")


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.faults)])
def test_two_runs_on_one_output(commands: Any, recipe_yaml: Path, tmp_path: Path, count: int) -> None:
    """The same recipe, or another one, started together."""
    other = ["--set", "split.eval_fraction=0.4"]
    commands.run("prepare", recipe_yaml, "-o", tmp_path / "one")
    commands.run("prepare", recipe_yaml, "-o", tmp_path / "two", *other)
    results = [ids(tmp_path / name) for name in ("one", "two")]
    for turn in range(count):
        place = tmp_path / f"both-{turn}"
        first = commands.start("prepare", recipe_yaml, "-o", place)
        second = commands.start("prepare", recipe_yaml, "-o", place, *(other if turn % 2 else []))
        codes = first.wait(), second.wait()
        assert 0 in codes
        for child, holder, code in ((first, second, codes[0]), (second, first, codes[1])):
            told = REFUSED.search(" ".join(child.printed.split()))
            assert code == 0 or (code == 1 and told and int(told[1]) == holder.pid), child.printed
        assert ids(place) in results
        assert orpo_data.lineage(place / "tokenize").nodes[-1].sound
        assert list(place.parent.glob(".*.lock")) + list(place.rglob("*.lock")) == []
        shutil.rmtree(place)


def ids(run: Path) -> dict[str, list[str]]:
    """The rows of every stage, each of which must be sound."""
    stages = ("ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize")
    assert all(orpo_data.verify(run / stage).ok for stage in stages)
    return {stage: read_table(run / stage)["id"].to_pylist() for stage in stages}


def test_a_killed_run_is_in_nobodys_way(commands: Any, recipe_yaml: Path, tmp_path: Path) -> None:
    run = ["prepare", recipe_yaml, "-o", tmp_path / "run"]
    killed = commands.start(*run, below=tmp_path, kill_at=400)
    assert killed.wait() == -9
    assert (tmp_path / "run/.run.lock").exists()
    again = commands.run("-v", *run)
    assert f"the lock was left by process {killed.pid} on" in " ".join(again.printed.split())


@pytest.mark.slow
def test_two_schedules_fire_together(
    prefect_server: dict[str, str], commands: Any, recipe_yaml: Path, tmp_path: Path
) -> None:
    """Two flows over one output folder: one does the work, the other waits or says who does it."""
    run = ["run", recipe_yaml, "-o", tmp_path / "run"]
    both = [commands.start(*run, environment=prefect_server) for _ in range(2)]
    codes = [child.wait() for child in both]
    assert 0 in codes
    for child, other, code in zip(both, reversed(both), codes, strict=True):
        told = REFUSED.search(" ".join(child.printed.split()))
        assert code == 0 or (told and int(told[1]) == other.pid), child.printed
    assert all(orpo_data.verify(tmp_path / "run" / stage).ok for stage in ("tokenize", "model", "evaluate"))


# --- readers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.faults)])
@pytest.mark.parametrize("reader", ["table", "load", "scan"])
def test_a_reader_during_a_rewrite(
    prepared: Path, make_recipe: Callable[..., Any], tmp_path: Path, count: int, reader: str
) -> None:
    """Sees one version or the other, whole; what it has opened stays as it is."""
    readers: dict[str, Callable[[], list[str]]] = {
        "table": lambda: read_table(tmp_path / "out", "eval")["id"].to_pylist(),
        "load": lambda: orpo_data.load(tmp_path / "out", "eval")["id"][:],
        "scan": lambda: orpo_data.scan(tmp_path / "out", "eval").collect()["id"].to_list(),
    }
    recipes = [make_recipe(f"split.eval_fraction={fraction}") for fraction in (0.2, 0.4)]

    def rewrite(turns: int) -> None:
        for turn in range(turns):
            stages.split(prepared / "clean", recipes[turn % 2], tmp_path / "out")

    rewrite(2)
    opened, versions = read_table(tmp_path / "out", "eval"), [readers[reader]()]
    rewrite(1)
    versions.append(readers[reader]())
    seen = set()
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(rewrite, count)
        while not writer.done():
            rows = readers[reader]()
            assert rows in versions
            seen.add(len(rows))
        writer.result()
    assert len(seen) == 2
    assert opened["id"].to_pylist() == versions[0]
