"""A run killed at any instant costs nothing: the next one ends in the bytes of a run that nobody disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orpo_data
from orpo_data.manifest import read_manifest
from orpo_data.reuse import PARTS_NAME

ROOT = Path(__file__).parents[2]
BEFORE = {"a": [1, 2, 3, 4], "b": [5, 6, 7], "c": [1, 11]}
AFTER = {"d": [8, 9, 10], "b": [5, 6, 7], "c": [1, 12, 13], "e": [3, 3]}
CHAIN = [("without", 3), ("first", 3), ("twice", 4), ("shift", 2)]

CHILD = """
import importlib.util, json, os, shutil, signal, sys
from pathlib import Path
from orpo_data import branch, events, folders, parts, provenance, reuse, stage, writing

conftest, after, chain, root = sys.argv[1], *map(json.loads, sys.argv[2:4]), Path(sys.argv[4])
spec = importlib.util.spec_from_file_location("toys", conftest)
module = sys.modules["toys"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
toys = module.Toys()
provenance.package_versions(), provenance.git_commit()  # once, not in every child

POINTS = {
    "batch": (parts._Sink, "take"), "close": (parts._Sink, "__exit__"), "keep": (reuse.NoteCache, "keep"),
    "judge": (branch, "_judge"), "verdicts": (parts.PartRun, "set_verdicts"), "earlier": (reuse.Earlier, "part"),
    "link": (reuse, "copy"), "adopt": (writing.DatasetWriter, "adopt"), "records": (stage, "write_part_records"),
    "manifest": (folders, "write_manifest"), "rename": (Path, "rename"), "remove": (folders, "remove_folder"),
    "clear": (writing, "remove_folder"), "unlink": (Path, "unlink"),
}

def passed(name, points, die_at=None):
    '''How often a run comes by each of the points; it dies when it comes there for the time `die_at`.'''
    shutil.copytree(root / "before", root / name)
    calls = dict.fromkeys(points, 0)
    def patch(point):
        holder, attribute = POINTS[point]
        function = getattr(holder, attribute)
        def passing(*args, **kwargs):
            calls[point] += 1
            if calls[point] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        setattr(holder, attribute, passing)
    for point in points:
        patch(point)
    toys.run(root / name / "out", [toys.part(*part) for part in after], list(map(tuple, chain)), batch_rows=2)
    return calls

def forked(function):
    '''What it returns in a process of its own; None if that was killed.'''
    question, answer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(answer, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(answer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(question) as told:
        return None if os.WIFSIGNALED(status) else json.load(told)

for point, total in forked(lambda: passed("nowhere", POINTS)).items():
    for die_at in {1, total}:
        assert forked(lambda: passed(f"{point}-{die_at}", [point], die_at)) is None, (point, die_at)
"""


def test_killed_at_any_instant_the_next_run_ends_in_the_same_bytes(toys: Any, tmp_path: Path) -> None:
    """Over an older output, so that there is something to lose, to take over and to work on."""
    before, after = ([toys.part(*part) for part in parts.items()] for parts in (BEFORE, AFTER))
    (tmp_path / "before").mkdir()
    toys.run(tmp_path / "before/out", before, CHAIN, batch_rows=2)
    (tmp_path / "fresh").mkdir()
    toys.run(tmp_path / "fresh/out", after, CHAIN, batch_rows=2)
    arguments = [str(Path(__file__).with_name("conftest.py")), *map(json.dumps, [list(AFTER.items()), CHAIN]), tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, env=environment, timeout=100)
    instants = [folder for folder in tmp_path.iterdir() if folder.name[-1].isdigit()]
    assert len(instants) > 20
    for folder in instants:
        output = folder / "out"
        assert not output.exists() or orpo_data.verify(output).ok  # a whole dataset or none, and one in any case
        assert output.exists() or orpo_data.verify(folder / ".out.stale").ok
        toys.run(output, after, CHAIN, batch_rows=2)
        assert sorted(path.name for path in folder.iterdir()) == [".out.notes", "out"], folder
        assert orpo_data.verify(output).ok
        made, fresh = read_manifest(output), read_manifest(tmp_path / "fresh/out")
        assert (made.content_hash, made.steps) == (fresh.content_hash, fresh.steps), folder
        assert made.files[PARTS_NAME] == fresh.files[PARTS_NAME], folder
        names = [{file.name for file in (root / ".out.notes").iterdir()} for root in (folder, tmp_path / "fresh")]
        assert names[0] == names[1]
