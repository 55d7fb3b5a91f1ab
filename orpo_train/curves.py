"""Pictures of training runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Lines = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl, each with its `step`; the names of held-out figures begin with eval/."""

LOGPS = "log-probability of the answers"
LOG_ODDS = "log odds ratio, chosen over rejected"
PANELS = {
    LOGPS: {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    LOG_ODDS: {"log_odds_chosen": "log odds ratio"},
    "loss": {"loss": "total", "nll_loss": "supervised (NLL)"},
    "share of pairs where chosen is likelier": {"rewards/accuracies": "accuracy"},
}
REWARD_PANELS = {
    "score of the answers": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "margin, chosen over rejected": {"rewards/margins": "margin"},
    "loss": {"loss": "total"},
    "share of pairs where chosen scores higher": {"rewards/accuracies": "accuracy"},
}
"""Of a reward model, which knows no log-probabilities."""

PPO_PANELS = {
    "score of the answers drawn": {"score": "score", "reward": "less the weighted KL"},
    "KL to the model that training began with": {"kl": "KL"},
    "loss": {"policy_loss": "policy", "value_loss": "value"},
    "tokens of an answer": {"answer_tokens": "tokens"},
}
"""Of a model that learns from a judge."""

CHANCE = {
    LOG_ODDS: 0.0,
    "margin, chosen over rejected": 0.0,
    "share of pairs where chosen is likelier": 0.5,
    "share of pairs where chosen scores higher": 0.5,
}
AXES = {LOGPS: "log-probability", LOG_ODDS: "log odds ratio"}
COLOURS = {"chosen": "#1f6fb4", "rejected": "#c8443a", "supervised (NLL)": "#7f8c8d"}
DARK = "#2c3e50"


def draw_curves(path: Path, train: Lines, evaluations: Lines) -> None:
    """Four panels over optimizer steps: faint lines for training batches, dots for the held-out pairs."""
    figure, grid = _pyplot().subplots(2, 2, figsize=(11, 7), layout="constrained")
    panels = panels_of([*train, *evaluations])
    for axes, (title, metrics) in zip(grid.flat, panels.items(), strict=True):
        _draw_panel(axes, title, metrics, [*train, *evaluations])
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("optimizer step")
        _label_curves(axes)
    _save(figure, path)


def draw_comparison(path: Path, runs: Mapping[str, Lines]) -> None:
    """One column a run on shared axes: log-probabilities of both answers above, the log odds ratio below.

    The paper's picture (arXiv 2403.07691): under sft both log-probabilities rise together, under orpo they part.
    """
    size = (1.5 + 3 * len(runs), 6)
    shared = {"sharex": True, "sharey": "row", "squeeze": False}
    figure, grid = _pyplot().subplots(2, len(runs), figsize=size, layout="constrained", **shared)
    panels = list(panels_of([line for lines in runs.values() for line in lines]).items())[:2]
    for column, (name, lines) in zip(grid.T, runs.items(), strict=True):
        for axes, (title, metrics) in zip(column, panels, strict=True):
            _draw_panel(axes, title, metrics, lines)
        column[0].set_title(name, fontsize=11)
        column[1].set_xlabel("optimizer step")
    for axes, (title, _) in zip(grid[:, 0], panels, strict=True):
        axes.set_ylabel(AXES.get(title, title))
    _label_curves(grid[0, 0])
    _save(figure, path)


def panels_of(lines: Lines) -> dict[str, dict[str, str]]:
    """What there is to draw: metrics and their labels, by the title of a panel."""
    names = {name.removeprefix("eval/") for line in lines for name in line}
    if "logps/chosen" in names:
        return PANELS
    return PPO_PANELS if "score" in names else REWARD_PANELS if "rewards/chosen" in names else PANELS


def _draw_panel(axes: Any, title: str, metrics: Mapping[str, str], lines: Lines) -> None:
    """Each metric of a panel, as far as the lines have it: training under sft knows nothing of rejected answers."""
    if title in CHANCE:
        axes.axhline(CHANCE[title], color="#b0b7bd", linewidth=0.8, zorder=0)
    for metric, label in metrics.items():
        colour = COLOURS.get(label, DARK)
        axes.plot(*_course(lines, metric), color=colour, linewidth=1.2, alpha=0.4)
        axes.plot(*_course(lines, f"eval/{metric}"), color=colour, linewidth=1.2, marker="o", markersize=4.5)
        axes.plot([], [], color=colour, linewidth=2, label=label)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _label_curves(axes: Any) -> None:
    """Which colour is which curve, in the panel; a single curve is named by the panel's title."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(handles, labels, frameon=False, fontsize=9)


def _course(lines: Lines, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, of the lines that have it."""
    having = [line for line in lines if metric in line]
    return [line["step"] for line in having], [line[metric] for line in having]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    """Write the picture; below it stands what faint lines and dots are."""
    from matplotlib.lines import Line2D

    faint = Line2D([], [], color=DARK, linewidth=1.2, alpha=0.4, label="training batches")
    dots = Line2D([], [], color=DARK, linewidth=1.2, marker="o", markersize=4.5, label="held-out pairs")
    figure.legend(handles=[faint, dots], loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    _pyplot().close(figure)
