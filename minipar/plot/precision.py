"""Pictures of numbers' sizes, over the range of float16."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from minipar.amp.histogram import BINS, NORMAL, OVERFLOW, SMALLEST
from minipar.amp.policy import PrecisionPolicy
from minipar.plot.figure import COLOURS, new_figure


def precision_histograms(policy: PrecisionPolicy, path: Path) -> None:
    """Draw how large values and gradients are, in powers of two, over float16's range; save the picture.

    Three panels: values, gradients as they are, and gradients multiplied by the loss scale.

    Args:
        policy: one that has decided.
        path: where to, .png, .pdf or .svg.
    """
    shift = math.log2(policy.scale)
    scale = f"2^{shift:g}" if shift.is_integer() else f"{policy.scale:g}"
    panels = (
        ("values", policy.values, 0),
        ("gradients", policy.gradients, 0),
        (f"gradients × loss scale {scale}", policy.gradients, shift),
    )
    figure = new_figure(8.0, 6.5)
    for axes, (title, histograms, moved) in zip(figure.subplots(len(panels), 1, sharex=True), panels):
        for low, high, name, shade in (
            (-70, SMALLEST - 1, "vanishes", "0.75"),
            (SMALLEST - 1, NORMAL, "subnormal", "0.9"),
            (NORMAL, OVERFLOW, "normal", "1.0"),
            (OVERFLOW, 40, "overflows", "0.75"),
        ):
            axes.axvspan(low, high, color=shade, zorder=0)
            place = {"ha": "center", "va": "top", "transform": axes.get_xaxis_transform()}
            axes.text((low + high) / 2, 0.97, name, **place)
        bottom = np.zeros(BINS)
        for colour, dtype in zip(COLOURS, ("float16", "float32")):
            chosen = [h for name, h in histograms.items() if policy.decisions[name].dtype == dtype]
            counts = np.sum([h.counts[:BINS] for h in chosen], axis=0) if chosen else np.zeros(BINS)
            if chosen:
                places = chosen[0].exponents + moved + 0.5  # exponent e stands for 2^e up to 2^(e+1)
                axes.bar(places, counts, 0.9, bottom, color=colour, label=f"computes in {dtype}")
            bottom = bottom + counts
        axes.set_xlim(-70, 40)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel("elements")
    axes.set_xlabel("exponent: floor(log2 |x|)")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=150)
