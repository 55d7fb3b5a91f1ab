"""What is drawn of a run's metrics."""

import matplotlib.image
import pytest

from orpo_train import curves

TRAIN = [{"step": i, "loss": 3.0 - i, "nll_loss": 2.0, "logps/chosen": -1.0, "tokens": 9} for i in (1, 2)]
HELD_OUT = [
    {"step": i, **{f"eval/{name}": value for name, value in figures.items()}}
    for i in (1, 2)
    for figures in [{"loss": 3.0, "logps/chosen": -1.0, "logps/rejected": -2.0, "log_odds_chosen": 1.0}]
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, still whole."""
    kept = []
    save = curves._save

    def keep(figure, path):
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(curves, "_save", keep)
    return kept


def drawn(axes) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The points of every line with data, by colour and marker."""
    return {
        (line.get_color(), line.get_marker()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.lines
        if len(line.get_xdata()) and line.get_xdata()[0] != 0
    }


def test_curves_without_rejected_figures(figures, tmp_path):
    """Training under sft: the rejected answers appear where they are held out only."""
    curves.draw_curves(tmp_path / "curves.png", TRAIN, HELD_OUT)
    panel = drawn(figures[0].axes[0])
    chosen, rejected = curves.COLOURS["chosen"], curves.COLOURS["rejected"]
    assert panel == {
        (chosen, "None"): [(1, -1.0), (2, -1.0)],
        (chosen, "o"): [(1, -1.0), (2, -1.0)],
        (rejected, "o"): [(1, -2.0), (2, -2.0)],
    }
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0


def test_held_out_points_are_connected(figures, tmp_path):
    curves.draw_curves(tmp_path / "curves.png", TRAIN, HELD_OUT)
    dots = [line for line in figures[0].axes[0].lines if line.get_marker() == "o"]
    assert [line.get_linestyle() for line in dots] == ["-", "-"]


@pytest.mark.parametrize("evaluations", [[], HELD_OUT])
def test_a_run_without_training_lines_or_evaluations_is_drawn(tmp_path, evaluations):
    curves.draw_curves(tmp_path / "curves.png", [], evaluations)
    assert (tmp_path / "curves.png").stat().st_size


def test_comparison_has_a_column_a_run_on_one_scale(figures, tmp_path):
    low = [line | {"eval/logps/rejected": -9.0} for line in HELD_OUT]
    curves.draw_comparison(tmp_path / "comparison.png", {"sft": [*TRAIN, *HELD_OUT], "orpo": low})
    above, below = figures[0].axes[:2], figures[0].axes[2:]
    assert [axes.get_title() for axes in above] == ["sft", "orpo"]
    assert above[0].get_ylim() == above[1].get_ylim()
    assert drawn(above[1])[curves.COLOURS["rejected"], "o"] == [(1, -9.0), (2, -9.0)]
    assert drawn(below[0]) == {(curves.DARK, "o"): [(1, 1.0), (2, 1.0)]}


def test_the_same_metrics_make_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        curves.draw_comparison(tmp_path / name, {"run": [*TRAIN, *HELD_OUT]})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
