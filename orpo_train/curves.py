"""The picture of a training run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = {
    "log-probability of the answers": {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    "log odds ratio, chosen over rejected": {"log_odds_chosen": "log odds ratio"},
    "loss": {"loss": "total", "nll_loss": "supervised (NLL)"},
    "share of pairs where chosen is likelier": {"rewards/accuracies": "accuracy"},
}
COLOURS = {"rejected": "#c0392b", "supervised (NLL)": "#7f8c8d"}


def draw_curves(path: Path, train: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> None:
    """Four panels over optimizer steps: lines for training batches, dots for evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axes, (title, curves) in zip(grid.flat, PANELS.items(), strict=True):
        for metric, label in curves.items():
            colour = COLOURS.get(label, "#1f77b4")
            lines = [line for line in train if metric in line]
            axes.plot([line["step"] for line in lines], [line[metric] for line in lines], color=colour, label=label)
            dots = [line for line in evaluations if f"eval/{metric}" in line]
            held_out = {"color": colour, "linestyle": "none", "marker": "o", "label": f"{label}, held out"}
            axes.plot([line["step"] for line in dots], [line[f"eval/{metric}"] for line in dots], **held_out)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
