"""The picture of the flow: it loses no row, its pieces join, and widths are rows."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orpo_data.chain import Node
from orpo_data.manifest import FORMAT_VERSION, Manifest, Shard, StepCounts
from orpo_data.pages.flow import ALL, HEIGHT, WIDTH, Piece, flow

MOST_ROUNDING = 0.11  # coordinates have one digit


def step(name: str, rows_in: int, source: str | None = None, made: int = 0, **dropped: int) -> StepCounts:
    rows_out = rows_in + made - sum(dropped.values())
    counts: dict[str, Any] = {"rows_in": rows_in, "expanded": made, "rows_out": rows_out, "dropped": dropped}
    return StepCounts(step=name, version=1, source=source, config={}, **counts)


def stage(name: str, rows_in: int, *steps: StepCounts, path: str = "", splits: tuple[int, ...] = ()) -> Node:
    lost = sum(sum(step.dropped.values()) - step.expanded for step in steps)
    names = ["train", "eval"][: len(splits)] or [None]
    shards = [
        Shard(path="x", split=split, rows=rows, tokens=None, bytes=0, sha256="")
        for split, rows in zip(names, splits or (rows_in - lost,), strict=True)
    ]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        stage=name,
        fingerprint="",
        content_hash="",
        key={},
        inputs=[],
        rows_in=rows_in,
        steps=list(steps),
        shards=shards,
        dropped=[],
        files={},
        recipe={},
        seed=None,
        versions={},
        git_commit=None,
    )
    return Node(Path(), manifest, link=path)


@st.composite
def chains(draw: st.DrawFn) -> list[Node]:
    """One to three sources that are ingested, binarized by source, and cleaned together; any step may drop or make."""

    def steps(rows: int, source: str | None) -> list[StepCounts]:
        done = []
        for name in draw(st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3)):
            made, lost = draw(st.integers(0, 50)), draw(st.integers(0, rows))
            one = draw(st.integers(0, lost))
            done.append(step(name, rows, source, made, first=one, second=lost - one))
            rows = done[-1].rows_out
        return done

    sources = ["x", "y", "z"][: draw(st.integers(1, 3))]
    ingested = {source: steps(draw(st.integers(0, 10_000)), source) for source in sources}
    rows = {source: done[-1].rows_out for source, done in ingested.items()}
    binarized = {source: steps(rows[source], source) for source in sources if draw(st.booleans())}
    together = sum(binarized[source][-1].rows_out if source in binarized else rows[source] for source in sources)
    cleaned = steps(together, None)
    kept = cleaned[-1].rows_out
    train = draw(st.integers(0, kept))
    chain = [stage("ingest", done[0].rows_in, *done, path=f"../i/{source}") for source, done in ingested.items()]
    chain.append(stage("binarize", sum(rows.values()), *[s for done in binarized.values() for s in done], path="../b"))
    return [*chain, stage("clean", together, *cleaned, splits=(train, kept - train))]


Edge = tuple[float, float]


def edges(path: str) -> tuple[Edge, Edge]:
    """The top and the bottom edge of a band, each from left to right; a lane that begins here has one width."""
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
    if "C" not in path:
        return (numbers[0], numbers[2]), (numbers[0], numbers[2])
    return (numbers[0], numbers[-2]), (numbers[6], numbers[8])


def bands(piece: Piece) -> dict[str, tuple[Edge, Edge]]:
    """Edges by the class of the outline, of those that reach the bottom of the box."""
    return {kind: edges(path) for kind, path in piece.shapes if kind != "node"}


@given(chains())
def test_no_row_is_lost_on_the_way(chain):
    lines = [piece.line for piece in flow(chain)]
    for line in lines:
        change = sum(line.after.values()) - sum(line.before.values())
        if line.kind == "stage":
            assert change >= 0  # rows of a source come in
        else:
            assert change == (line.step.expanded if line.kind == "step" else -line.lost)
    for line, following in pairwise(lines):
        assert dict(line.after) == dict(following.before)
    assert sum(line.lost for line in lines) == sum(sum(stage.manifest.drop_reasons.values()) for stage in chain)
    assert sum(lines[-1].after.values()) == chain[-1].manifest.rows


@given(chains())
def test_everything_is_inside_the_box(chain):
    for piece in flow(chain):
        for _, path in piece.shapes:
            for x, y in re.findall(r"([-\d.]+),([-\d.]+)", path):
                assert 0 <= float(x) <= WIDTH + MOST_ROUNDING
                assert 0 <= float(y) <= HEIGHT


TWO_SOURCES = [
    stage("ingest", 80, step("parse", 80, "x"), path="../i/x"),
    stage("ingest", 20, step("parse", 20, "y"), path="../i/y"),
    stage("binarize", 100, step("binarize", 80, "x", tie=30)),
]


@given(chains())
@example(TWO_SOURCES)
def test_what_falls_out_is_as_wide_as_its_rows_are_many_and_hits_no_lane(chain):
    pieces = flow(chain)
    scales = set()
    for piece in pieces:
        shapes = bands(piece)
        if not piece.line.lost:
            continue
        top, bottom = shapes["lost"]
        assert bottom[1] - bottom[0] == pytest.approx(top[1] - top[0], abs=2 * MOST_ROUNDING)
        if piece.line.lost > 100:
            scales.add(round((top[1] - top[0]) / piece.line.lost, 2))
        for kind, (_, (left, right)) in shapes.items():
            if kind.startswith("lane"):
                assert right <= bottom[0] + MOST_ROUNDING or left >= bottom[1] - MOST_ROUNDING or right - left < 0.2
    assert len(scales) <= 2  # one scale everywhere, up to rounding


def test_the_pieces_of_a_lane_join():
    chain = [
        stage("ingest", 80, step("parse", 80, "x", bad=10), path="../i/x"),
        stage("ingest", 20, step("parse", 20, "y"), path="../i/y"),
        stage("clean", 90, step("clean", 90, made=10, tie=40)),
    ]
    above: dict[str, Edge] = {}
    for piece in flow(chain):
        shapes = bands(piece)
        lost = shapes.pop("lost", None)
        for lane, (top, _) in shapes.items():
            if piece.line.kind == "merge":
                assert top == pytest.approx(above[lane])
            elif lane in above:
                right = lost[0][1] if lost and lost[0][0] == top[1] else top[1]  # what falls out is beside its lane
                assert (top[0], right) == pytest.approx(above[lane])
        above = {lane: bottom for lane, (_, bottom) in shapes.items()}
        if piece.line.kind == "merge":  # two lanes side by side become one as wide as both
            (left, middle), (beside, right) = above["lane-1"], above["lane-2"]
            assert middle == pytest.approx(beside)
            above = {"lane-0": (left, right)}
    assert set(above) == {"lane-0"}


def test_lines_of_a_hand_worked_chain():
    chain = [
        stage("ingest", 80, step("parse", 80, "x", bad=10), path="../i/x"),
        stage("ingest", 20, step("parse", 20, "y"), path="../i/y"),
        stage("clean", 90, step("clean", 90, tie=5, empty=7), splits=(70, 8)),
    ]
    lines = [(piece.line.kind, piece.line.label, piece.line.rows) for piece in flow(chain)]
    assert lines == [
        *(("stage", "ingest · x", 80), ("step", "parse", 80), ("drop", "bad", 70)),
        *(("stage", "ingest · y", 20), ("step", "parse", 20), ("merge", "", 90)),
        *(("stage", "clean", 90), ("step", "clean", 90), ("drop", "empty", 83), ("drop", "tie", 78)),
        ("end", "kept", 78),
    ]
    assert flow(chain)[-1].line.after == {"train": 70, "eval": 8}


def test_a_stage_whose_inputs_are_gone_begins_with_what_it_read():
    pieces = flow([stage("binarize", 100, step("binarize", 60, "x", tie=10))])
    first = pieces[0].line
    assert first.after == {"x": 60, "other sources": 40}
    assert [piece.line.kind for piece in pieces] == ["stage", "step", "drop", "merge", "end"]
    assert pieces[-1].line.after == {ALL: 90}


def test_rare_reasons_of_many_share_a_line():
    reasons = {f"reason_{n:02d}": 20 - n for n in range(15)}
    pieces = flow([stage("clean", 1000, step("clean", 1000, **reasons))])
    drops = [piece.line for piece in pieces if piece.line.kind == "drop"]
    assert [line.lost for line in drops] == [*range(20, 11, -1), 11 + 10 + 9 + 8 + 7 + 6]
    assert drops[-1].label == "6 more reasons"


def test_an_empty_flow_has_a_picture():
    assert flow([stage("clean", 0)])[-1].line.rows == 0
