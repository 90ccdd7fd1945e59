"""Curves: training losses of one run or several, scaling over ranks, and fits of communication times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from minipar.plot.figure import curve_style, new_figure, smoothed


def loss_curves(
    curves: Mapping[str, Sequence[float]],
    path: Path,
    *,
    validation: Mapping[int, float] | None = None,
    title: str = "",
    first: int | Mapping[str, int] = 1,
) -> Figure:
    """Draw training losses over steps, each faint with its moving average on top; save the picture and return it.

    Args:
        curves: losses in nats by run name, one a step.
        path: where to, .png, .pdf or .svg.
        validation: validation loss by step.
        first: the step of the curves' first loss, of all alike or by run name.
    """
    figure = new_figure()
    axes = figure.subplots()
    for number, (name, losses) in enumerate(curves.items()):
        begin = first if isinstance(first, int) else first[name]
        steps, style = range(begin, begin + len(losses)), curve_style(number)
        axes.plot(steps, losses, color=style["color"], alpha=0.25, linewidth=0.8)
        every = max(1, len(losses) // 8)
        axes.plot(steps, smoothed(losses), **style, markevery=(number % every, every), markersize=4, label=name)
    if validation:
        axes.plot(list(validation), list(validation.values()), "ko", markersize=5, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return figure


def scaling_curve(
    curves: Mapping[str, Mapping[int, float]], path: Path, *, title: str = "", unit: str = "samples/s"
) -> Figure:
    """Draw throughput over ranks on logarithmic axes, with the ideal line through each curve's first point.

    The picture is saved and returned. At the end of each curve stands how much of the ideal it reaches.

    Args:
        curves: {name: {ranks: throughput}}.
        path: where to, .png, .pdf or .svg.
        unit: of the throughput.
    """
    figure = new_figure()
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        style, ranks = curve_style(number), sorted(points)
        first = points[ranks[0]] / ranks[0]
        axes.plot(ranks, [first * n for n in ranks], color=style["color"], linestyle=":", linewidth=1)
        axes.plot(ranks, [points[n] for n in ranks], **{**style, "linestyle": "-"}, label=name)
        last = ranks[-1]
        efficiency = points[last] / (first * last)
        axes.annotate(
            f"{100 * efficiency:.0f} %", (last, points[last]), xytext=(6, -4), textcoords="offset points", size=8
        )
    axes.plot([], [], color="0.4", linestyle=":", label="ideal")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    every = sorted({n for points in curves.values() for n in points})
    axes.set_xticks(every, [str(n) for n in every])
    axes.set_xlim(every[0] / 1.1, every[-1] * 1.2)  # room for the efficiencies
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.4g}")
    axes.set_xlabel("ranks")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return figure


def communication_fit(
    samples: Mapping[str, Sequence[tuple[float, float]]],
    fits: Mapping[str, tuple[float, float]],
    path: Path,
    *,
    title: str = "",
) -> Figure:
    """Draw measured communication times over bytes, and the line α + βn fitted to each; save and return it.

    Args:
        samples: {operation: [(bytes, seconds)]}.
        fits: {operation: (α in seconds, β in seconds a byte)}.
        path: where to, .png, .pdf or .svg.
    """
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    for number, (name, points) in enumerate(samples.items()):
        style, (alpha, beta) = curve_style(number), fits[name]
        n = np.geomspace(min(x for x, _ in points), max(x for x, _ in points), 100)
        bandwidth = f"{1e-9 / beta:.3g} GB/s" if beta else "no slope"
        axes.plot(n, 1e6 * (alpha + beta * n), color=style["color"], linewidth=1)
        axes.plot(
            [x for x, _ in points], [1e6 * y for _, y in points], **{**style, "linestyle": ""}, markersize=5,
            label=f"{name}: {1e6 * alpha:.3g} µs, {bandwidth}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes")
    axes.set_ylabel("time (µs)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="measured (points), α + βn (lines)", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=150)
    return figure
