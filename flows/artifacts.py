"""What a run shows on Prefect's pages: counts, digests, figures and the curves. No text from the data."""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact

from orpo_data.places import as_path
from pipelines.compare.page import comparison_tables

LARGEST_PICTURE = 300_000
"""Bytes: a picture travels inside the artifact, which Prefect keeps in its database."""

MARKDOWN = re.compile(r"([\\`*_\[\]!|~])")


def artifact_key(name: str, what: str) -> str:
    """Lower case, digits and dashes, as Prefect wants them: "My run" and "stages" give `my-run-stages`."""
    return "-".join(re.findall(r"[a-z0-9]+", f"{name} {what}".lower()))


def escape(text: object) -> str:
    """`text` on one line, that neither markdown nor HTML gives a meaning to."""
    return MARKDOWN.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def publish_stages(name: str, reports: Sequence[dict[str, Any]]) -> None:
    """Rows in and out, drops by reason, and the digest of each data stage."""
    create_markdown_artifact(stages_page(name, reports), artifact_key(name, "stages"), "Rows of every stage")


def publish_evaluation(name: str, model: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """The metrics before and after training, and where the model lies."""
    page = evaluation_page(name, model, evaluation)
    create_markdown_artifact(page, artifact_key(name, "evaluation"), "Held-out pairs, before and after training")


def publish_curves(name: str, picture: Path) -> None:
    """The training curves; on a page, since Prefect's artifact for pictures prints the whole address below them."""
    create_markdown_artifact(curves_page(name, picture), artifact_key(name, "curves"), "Training curves")


def publish_comparison(name: str, comparison: dict[str, Any]) -> None:
    """Win rates and held-out figures of a comparison, and what failed."""
    create_markdown_artifact(comparison_page(name, comparison), artifact_key(name, "comparison"), "Methods compared")


def publish_drift(name: str, diffs: Sequence[dict[str, Any]], refused: str = "") -> None:
    """How the rows of each stage differ from those they replaced; why they did not, where they were `refused`."""
    if diffs:
        page = drift_page(name, diffs, refused)
        create_markdown_artifact(page, artifact_key(name, "drift"), "Difference from the run before")


def stages_page(name: str, reports: Sequence[dict[str, Any]]) -> str:
    rows = (
        (
            report["stage"],
            f"{report['rows_in']:,}",
            f"{report['rows_out']:,}",
            ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items()),
            f"{report['seconds']:.1f} s" if report["ran"] else "unchanged",
            report["content_hash"][:12],
            report["path"],
        )
        for report in reports
    )
    head = ("stage", "rows in", "rows out", "dropped", "took", "content", "written to")
    links = ", ".join(f"[{escape(report['stage'])}]({_report_address(report['path'])})" for report in reports)
    return f"# {escape(name)}\n\n{_table(head, rows)}\n\nReports, on the machine of the run: {links}\n"


def _report_address(folder: str) -> str:
    """Percent-encoded, so that no folder's name can end the link."""
    return (as_path(folder).absolute() / "report.html").as_uri()


def evaluation_page(name: str, model: dict[str, Any], evaluation: dict[str, Any]) -> str:
    result = evaluation["result"]
    before = result["before"] or {}
    rows = (
        (metric, f"{before[metric]:.4f}" if metric in before else "", f"{after:.4f}")
        for metric, after in result["after"].items()
    )
    places = (
        (what, report["path"], report["content_hash"][:12])
        for what, report in (("model", model), ("evaluation", evaluation))
    )
    metrics = _table((f"{result['pairs']:,} held-out pairs", "before", "after"), rows)
    return f"# {escape(name)}\n\n{metrics}\n\n{_table(('', 'written to', 'content'), places)}\n"


def drift_page(name: str, diffs: Sequence[dict[str, Any]], refused: str = "") -> str:
    parts = (f"# {escape(name)}", *filter(None, [escape(refused)]), *map(_drift_section, diffs))
    return "\n\n".join(parts) + "\n"


def _drift_section(diff: dict[str, Any]) -> str:
    counts = [(what, f"{diff[f'rows_{what}']:,}", "") for what in ("same", "changed")]
    moves = [
        (what, f"{move['rows']:,}", f"dropped by {move['step']}: {move['reason']}" if move["step"] else "not there")
        for what in ("out", "in")
        for move in diff[f"why_{what}"]
    ]
    shifts = [(shift["column"], f"{shift['distance']:.1%}") for shift in diff["shifts"]]
    parts = (
        f"## {escape(diff['new']['stage'])}",
        _table(("rows", "number", "in the other version"), counts + moves),
        _table(("column", "moved by"), shifts),
        "\n".join(f"- {escape(line)}" for line in diff["settings"]),
    )
    return "\n\n".join(parts)


def comparison_page(name: str, comparison: dict[str, Any]) -> str:
    parts = (f"# {escape(name)}", comparison_tables(comparison), *_failures(comparison))
    return "\n\n".join(filter(None, parts)) + "\n"


def _failures(comparison: dict[str, Any]) -> Iterable[str]:
    return (f"- {escape(run['name'])}: {escape(run['error'])}" for run in comparison["failed"])


def curves_page(name: str, picture: Path) -> str:
    content = picture.read_bytes()
    shown = f"![Training curves](data:image/png;base64,{base64.b64encode(content).decode()})\n\n"
    return f"# {escape(name)}\n\n{shown if len(content) <= LARGEST_PICTURE else ''}{escape(picture)}\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
