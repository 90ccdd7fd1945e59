"""Pictures, drawn with matplotlib, readable in print and without colour vision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito 2008: told apart by the colour-blind, and by lightness in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """Return an empty figure (inches). Made without pyplot, which keeps global state that threads would share."""
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
    curves: Mapping[str, Sequence[float]], path: Path, *, validation: Mapping[int, float] | None = None, title: str = ""
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
