"""How the benchmarks print: tables in markdown, medians with each round in brackets."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

WORK = Path(tempfile.gettempdir()) / "orpo-benchmarks"
MIB = 2**20


def with_median(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and the value of each round."""
    return f"**{median(values):{form}}** ({', '.join(f'{value:{form}}' for value in values)})"


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown CPU")
