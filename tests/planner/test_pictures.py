"""Pictures of plans, fits, runs and timelines: that they are drawn, and what is on the figure's axes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from minipar import plot
from minipar.parallel.pipeline.schedules import one_f_one_b
from minipar.parallel.pipeline.simulator import Costs, simulate
from minipar.plot.figure import curve_style

DRAW = {
    "memory_bars": lambda path: plot.memory_bars(
        {"rank 0": {"parameters": 1e6, "activations": 2e6}, "rank 1": {"parameters": 3e6}}, path, limit=4e6
    ),
    "plan_comparison": lambda path: plot.plan_comparison(
        {"dp 2": {"computation": 0.1, "sums": 0.02}, "tp 2": {"computation": 0.2}}, path, measured={"dp 2": 0.13}
    ),
    "scaling_curve": lambda path: plot.scaling_curve({"a": {1: 10.0, 2: 19.0, 4: 30.0}, "b": {1: 5.0, 4: 19.0}}, path),
    "communication_fit": lambda path: plot.communication_fit(
        {"send": [(8.0, 1e-6), (1e6, 1e-3)]}, {"send": (1e-6, 1e-9)}, path
    ),
    "gantt": lambda path: plot.gantt(simulate(one_f_one_b(2, 4)), path, unit="ms"),
    "gantt_pair": lambda path: plot.gantt_pair(
        simulate(one_f_one_b(2, 4)), simulate(one_f_one_b(2, 4), Costs(1.1, 0.9, 1.2)), path, unit="ms"
    ),
    "loss_curves": lambda path: plot.loss_curves({"a": [3.0, 2.0], "b": [3.1, 2.2]}, path),
}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_drawn(suffix: str, tmp_path: Path) -> None:
    for name, draw in DRAW.items():
        path = tmp_path / f"{name}{suffix}"
        draw(path)
        head = path.read_bytes()[:8]
        assert head.startswith(b"\x89PNG") if suffix == ".png" else path.read_text().lstrip().startswith("<?xml")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return tmp_path / "picture.png"


def keys(figure: Figure) -> list[str]:
    """Return the words of a figure's key, and of those of its axes."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def looks(line: Any) -> tuple[str, str, str]:
    return line.get_color(), line.get_marker(), line.get_linestyle()


def test_every_loss_curve_is_drawn_and_told_apart_without_colours(picture: Path) -> None:
    runs = {f"run {n}": [3.0 + n - 0.01 * step for step in range(50)] for n in range(12)}
    figure = plot.loss_curves(runs, picture, validation={50: 2.5}, first={name: 1 for name in runs} | {"run 3": 11})
    (axes,) = figure.axes
    assert keys(figure) == [*runs, "validation"] and len(axes.lines) == 2 * 12 + 1
    named = {line.get_label(): line for line in axes.lines}
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines[1:-1:2]}) == 12
    assert list(named["run 3"].get_xdata())[:2] == [11, 12] and list(named["run 2"].get_xdata())[:2] == [1, 2]
    assert list(named["run 5"].get_ydata()) == plot.smoothed(runs["run 5"])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats)")


def test_styles_of_many_curves_are_different() -> None:
    styles = [tuple(curve_style(n).values()) for n in range(28)]
    assert len(set(styles)) == 28
    for one, next_one in itertools.pairwise(styles):
        assert all(a != b for a, b in zip(one, next_one))


def test_a_scaling_curve_has_its_ideal_line_and_how_much_of_it_is_reached(picture: Path) -> None:
    figure = plot.scaling_curve({f"m{n}": {2: 20.0, 4: 36.0, 8: 60.0} for n in range(9)}, picture, unit="tokens/s")
    (axes,) = figure.axes
    assert keys(figure) == [*(f"m{n}" for n in range(9)), "ideal"]
    ideal, measured = axes.lines[0], axes.lines[1]
    assert list(ideal.get_xdata()) == [2, 4, 8] and list(ideal.get_ydata()) == [20.0, 40.0, 80.0]
    assert list(measured.get_ydata()) == [20.0, 36.0, 60.0]
    assert looks(ideal)[2] == ":" and looks(measured)[2] == "-"
    assert [text.get_text() for text in axes.texts] == ["75 %"] * 9
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "4", "8"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ranks", "tokens/s")


def test_a_fit_is_a_line_through_points(picture: Path) -> None:
    samples = {f"op {n}": [(10.0, 3e-6), (1e6, 1e-3)] for n in range(8)}
    figure = plot.communication_fit(samples, dict.fromkeys(samples, (2e-6, 1e-9)), picture)
    (axes,) = figure.axes
    assert keys(figure) == [f"{name}: 2 µs, 1 GB/s" for name in samples]
    line, points = axes.lines[0], axes.lines[1]
    assert list(points.get_xdata()) == [10.0, 1e6] and list(points.get_ydata()) == pytest.approx([3.0, 1e3])
    assert line.get_ydata()[0] == pytest.approx(2.01) and line.get_ydata()[-1] == pytest.approx(1002.0)


def test_memory_is_stacked_by_kind_with_the_limit(picture: Path) -> None:
    ranks = {"rank 0": {"parameters": 2.0**20, "activations": 2.0**21}, "rank 1": {"parameters": 3 * 2.0**20}}
    figure = plot.memory_bars(ranks, picture, limit=2.0**22)
    (axes,) = figure.axes
    assert set(keys(figure)) == {"parameters", "activations", "limit"} and axes.get_xlabel() == "memory (MiB)"
    bars = {bars.get_label(): [(bar.get_x(), bar.get_width()) for bar in bars] for bars in axes.containers}
    assert bars == {"parameters": [(0, 1), (0, 3)], "activations": [(1, 2), (3, 0)]}
    assert len({bars[0].get_hatch() for bars in axes.containers}) == 2  # for print
    assert list(axes.lines[-1].get_xdata()) == [4.0, 4.0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["rank 0", "rank 1"]


def test_plans_are_compared_with_what_was_measured(picture: Path) -> None:
    figure = DRAW["plan_comparison"](picture)
    (axes,) = figure.axes
    assert set(keys(figure)) == {"computation", "sums", "measured"} and axes.get_xlabel() == "step (ms)"
    (diamonds,) = axes.lines
    assert list(diamonds.get_xdata()) == pytest.approx([130.0]) and list(diamonds.get_ydata()) == [0]


def test_predicted_stands_above_measured_on_one_axis_of_time(picture: Path) -> None:
    figure = DRAW["gantt_pair"](picture)
    above, below = figure.axes[:2]
    assert above.get_title(loc="left").startswith("predicted: ") and "%" in above.get_title(loc="left")
    assert below.get_title(loc="left").startswith("measured: ") and below.get_xlabel() == "time (ms)"
    assert above.get_position().y0 > below.get_position().y0 and above.get_xlim() == below.get_xlim()
    assert {"forward", "backward", "bubble"} <= set(keys(figure))
    numbers = [text.get_text() for text in above.texts]
    assert numbers.count("3") == 4  # the last microbatch, forward and backward on two stages


def test_the_old_names_are_still_there() -> None:
    for name in ("COLOURS", "new_figure", "smoothed", "loss_curves", "partition_bars", "gantt", "precision_histograms"):
        assert hasattr(plot, name)
