"""The way of the rows as a picture: one line of a table for every stage, step and reason, with its piece of the flow.

Each source is a lane as wide as its rows are many. A step narrows its lane, what it drops falls out to the right, one
reason a line, and where a stage reads several datasets the lanes come together. Every piece is drawn in a box of
WIDTH x HEIGHT that is stretched to its cell, so that the pieces join whatever the size of the page, and the text beside
them stays text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orpo_data.chain import Node
from orpo_data.manifest import StepCounts

WIDTH, HEIGHT = 1000, 100
LANE_GAP, SPLIT_GAP, DROP_GAP = 22, 8, 14  # what falls out lands between its lane and the next
NODE_TOP, NODE_HEIGHT = 40, 9  # of the bar that marks a stage
MOST_REASONS = 10
COLOURS = 6
ALL = ""  # the lane of all sources together

Lanes = Mapping[str, int]
"""Rows of each lane, in the order in which they lie side by side."""


@dataclass(frozen=True)
class Line:
    """One line: `before` rows come in at its top and `after` leave at its bottom; `lost` of `lane` fall out."""

    kind: str  # stage, step, drop, merge or end
    label: str
    before: Lanes
    after: Lanes
    lane: str = ALL  # the one that a step works on
    lost: int = 0
    node: Node | None = None
    step: StepCounts | None = None

    @property
    def rows(self) -> int:
        """Rows of the lane that the line is about, of all lanes where it is about all."""
        return self.after[self.lane] if self.lane in self.after else sum(self.after.values())


@dataclass(frozen=True)
class Piece:
    """A line and its part of the picture: outlines by the class that colours them."""

    line: Line
    shapes: list[tuple[str, str]] = field(default_factory=list)


def flow(chain: Sequence[Node]) -> list[Piece]:
    """The whole way, from the first dataset of the chain to the splits of the last."""
    lines = list(_lines(chain))
    place = _Places(lines)
    return [Piece(line, list(place.shapes(line))) for line in lines]


def _lines(chain: Sequence[Node]) -> Iterator[Line]:
    lanes: dict[str, int] = {}
    for node in chain:
        merged = any(source is None for source, _ in node.branches) or not node.branches
        if merged and lanes.keys() - {ALL}:
            yield Line("merge", "", before=dict(lanes), after=(lanes := {ALL: sum(lanes.values())}), node=node)
        before = dict(lanes)
        lanes |= _new_lanes(node, lanes)
        own = next(iter(lanes.keys() - before.keys()), ALL) if len(lanes) - len(before) == 1 else ALL
        yield Line("stage", node.label, before, dict(lanes), own, node=node)
        for source, steps in node.branches:
            for step in steps:
                for line in _step_lines(node, step, source or ALL, lanes):
                    lanes = dict(line.after)
                    yield line
    if len(lanes) > 1:
        yield Line("merge", "", before=lanes, after=(lanes := {ALL: sum(lanes.values())}), node=chain[-1])
    last = chain[-1].manifest
    splits = {split: sum(shard.rows for shard in last.shards if shard.split == split) for split in last.splits}
    yield Line("end", "kept", lanes, splits or lanes, node=chain[-1])


def _new_lanes(node: Node, lanes: Lanes) -> dict[str, int]:
    """Lanes that begin with this stage, as many rows in all as it read beyond those already on their way."""
    new = {source or ALL: steps[0].rows_in for source, steps in node.branches if (source or ALL) not in lanes}
    rest = node.manifest.rows_in - sum(lanes.values()) - sum(new.values())
    return new | ({"other sources" if new else ALL: rest} if rest > 0 else {})


def _step_lines(node: Node, step: StepCounts, lane: str, lanes: Lanes) -> Iterator[Line]:
    """What a step makes, then what it drops, the most frequent reason first."""
    rows = dict(lanes) | {lane: step.rows_in + step.expanded}
    of_source = step.source if node.manifest.stage != "ingest" else None  # there the stage's own label says it
    yield Line("step", " · ".join(filter(None, [step.step, of_source])), lanes, rows, lane, step=step)
    reasons = sorted(step.dropped.items(), key=lambda item: (-item[1], item[0]))
    if len(reasons) > MOST_REASONS:
        rest = reasons[MOST_REASONS - 1 :]
        reasons = [*reasons[: MOST_REASONS - 1], (f"{len(rest)} more reasons", sum(lost for _, lost in rest))]
    for reason, lost in reasons:
        before, rows = rows, rows | {lane: rows[lane] - lost}
        yield Line("drop", reason, before, rows, lane, lost, step=step)


class _Places:
    """Where each lane lies: source lanes in slots as wide as they ever get, the others from the left edge."""

    def __init__(self, lines: Sequence[Line]) -> None:
        widest: dict[str, int] = {}
        for line in lines:
            for lane, rows in [*line.before.items(), *(line.after.items() if line.kind != "end" else ())]:
                widest[lane] = max(widest.get(lane, 0), rows)
        sources = [lane for lane in widest if lane != ALL]
        most = max(sum(widest[lane] for lane in sources), widest.get(ALL, 0), 1)
        gaps = max(LANE_GAP * (len(sources) - 1), SPLIT_GAP * (len(lines[-1].after) - 1), 0) + DROP_GAP
        self.scale = (WIDTH - gaps) / most
        self.left = {ALL: 0.0}
        for lane in sources:
            self.left[lane] = sum(widest[other] * self.scale + LANE_GAP for other in sources[: sources.index(lane)])
        self.colour = {lane: f"lane-{1 + index % COLOURS}" for index, lane in enumerate(sources)} | {ALL: "lane-0"}

    def shapes(self, line: Line) -> Iterator[tuple[str, str]]:
        if line.kind == "merge":
            yield from self._fan(line.before, self._side_by_side(line.before, 0), narrow_top=False)
        elif line.kind == "end":
            yield from self._fan(line.after, self._side_by_side(line.after, SPLIT_GAP), narrow_top=True)
        else:
            if line.lost:
                yield "lost", self._falling(line)
            for lane, rows in line.after.items():
                yield self.colour[lane], self._lane(line, lane, rows)
                if line.kind == "stage" and line.lane in (lane, ALL):
                    yield "node", self._bar(self.left[lane], rows)

    def _side_by_side(self, lanes: Lanes, gap: float) -> dict[str, float]:
        lefts, left = {}, 0.0
        for lane, rows in lanes.items():
            lefts[lane] = left
            left += rows * self.scale + gap
        return lefts

    def _fan(self, lanes: Lanes, lefts: Mapping[str, float], narrow_top: bool) -> Iterator[tuple[str, str]]:
        """Lanes that come together into one, or (`narrow_top`) part from one."""
        joined = self._side_by_side(lanes, 0)
        for lane, rows in lanes.items():
            width = rows * self.scale
            top, bottom = (joined[lane], lefts[lane]) if narrow_top else (self.left[lane], joined[lane])
            yield self.colour.get(lane, "lane-0"), _band(top, width, bottom, width)

    def _lane(self, line: Line, lane: str, rows: int) -> str:
        left, width = self.left[lane], rows * self.scale
        if lane not in line.before:  # it begins here
            return f"M{left:.1f},{NODE_TOP}H{left + width:.1f}V{HEIGHT}H{left:.1f}Z"
        above = width if line.lost else line.before[lane] * self.scale
        return _band(left, above, left, width)

    def _bar(self, left: float, rows: int) -> str:
        return f"M{left:.1f},{NODE_TOP}h{rows * self.scale:.1f}v{NODE_HEIGHT}H{left:.1f}Z"

    def _falling(self, line: Line) -> str:
        """From the right side of its lane into the room that the lane leaves there."""
        width, side = line.lost * self.scale, self.left[line.lane] + line.after[line.lane] * self.scale
        return _band(side, width, side + DROP_GAP, width)


def _band(top: float, top_width: float, bottom: float, bottom_width: float) -> str:
    """A ribbon from the top edge of the box to its bottom edge."""
    half = HEIGHT // 2
    ends = (bottom + bottom_width, top + top_width)
    return (
        f"M{top:.1f},0C{top:.1f},{half} {bottom:.1f},{half} {bottom:.1f},{HEIGHT}"
        f"H{ends[0]:.1f}C{ends[0]:.1f},{half} {ends[1]:.1f},{half} {ends[1]:.1f},0Z"
    )
