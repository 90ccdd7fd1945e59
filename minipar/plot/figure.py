"""What all pictures share: figures without pyplot, colours that print and that the colour-blind tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito 2008: told apart by the colour-blind, and by lightness in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # beside colours, for print
LINES = ("-", "--", "-.", ":")


def curve_style(number: int) -> dict[str, Any]:
    """Return colour, marker and line of a picture's n-th curve: those of the first 28 are all different."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


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
