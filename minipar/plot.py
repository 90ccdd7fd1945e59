"""Pictures, drawn with matplotlib, readable in print and without colour vision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minipar.parallel.assignment import KINDS, Assignment

# Okabe and Ito 2008: told apart by the colour-blind, and by lightness in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """Return an empty figure (inches); without pyplot, which keeps global state that threads would share."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average of `values`, free of the bias towards its start."""
    average, out = 0.0, []
    for i, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


def loss_curves(
    curves: Mapping[str, Sequence[float]],
    path: Path,
    *,
    validation: Mapping[int, float] | None = None,
    title: str = "",
) -> None:
    """Draw training losses over steps, each faint with its moving average on top, and save the picture.

    Args:
        curves: losses in nats by run name, one a step.
        path: where to, .png, .pdf or .svg.
        validation: validation loss by step.
    """
    figure = new_figure()
    axes = figure.subplots()
    for colour, (name, losses) in zip(COLOURS, curves.items()):
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color=colour, label=name)
    if validation:
        axes.plot(list(validation), list(validation.values()), "ko", markersize=5, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def partition_bars(assignment: Assignment, path: Path) -> None:
    """Draw what each device holds, in bytes by kind of layer, and its share of the cost; save the picture.

    Args:
        assignment: as a partition policy returns it.
        path: where to, .png, .pdf or .svg.
    """
    devices = [device.name for device in assignment.devices]
    rows = range(len(devices))
    figure = new_figure(8.0, 1.4 + 0.35 * len(devices))
    held, work = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    bars = assignment.bars()
    left = [0] * len(devices)
    for colour, kind in zip(COLOURS, KINDS):
        widths = [bar[kind] for bar in bars]
        if any(widths):
            held.barh(rows, widths, left=left, color=colour, edgecolor="white", label=kind)
            left = [a + b for a, b in zip(left, widths)]
    costs = [assignment.cost(d) for d in rows]
    total = sum(costs) or 1.0
    work.barh(rows, [100 * cost / total for cost in costs], color="0.5")
    held.set_yticks(rows, devices)
    held.invert_yaxis()  # the first device on top, as in the table
    held.set_ylabel("device")
    held.set_xlabel("parameters (bytes)")
    work.set_xlabel("share of cost (%)")
    figure.suptitle(f"{len(assignment.items)} parameters by {assignment.policy}")
    handles, kinds = held.get_legend_handles_labels()
    figure.legend(handles, kinds, frameon=False, ncols=len(KINDS), loc="outside lower center")
    figure.savefig(path, dpi=150)
