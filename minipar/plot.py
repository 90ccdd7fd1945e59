"""Pictures, drawn with matplotlib, readable in print and without colour vision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minipar.amp.histogram import BINS, NORMAL, OVERFLOW, SMALLEST
from minipar.amp.policy import PrecisionPolicy
from minipar.parallel.partition.assignment import KINDS, Assignment
from minipar.parallel.pipeline.simulator import Span, Timeline
from minipar.timeline import KIND_COLOURS, KIND_NAMES

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
    first: int = 1,
) -> None:
    """Draw training losses over steps, each faint with its moving average on top, and save the picture.

    Args:
        curves: losses in nats by run name, one a step.
        path: where to, .png, .pdf or .svg.
        validation: validation loss by step.
        first: the step of the curves' first loss.
    """
    figure = new_figure()
    axes = figure.subplots()
    for colour, (name, losses) in zip(COLOURS, curves.items()):
        steps = range(first, first + len(losses))
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


def gantt(timeline: Timeline, path: Path, *, title: str = "", unit: str = "") -> None:
    """Draw a pipeline's timeline, predicted or measured, and save the picture.

    A row is a stage; bars carry their microbatch where there is room, and are paler for each further chunk.
    The bubble is hatched. On the right: how much of the time a stage idles, and the most activations it holds.

    Args:
        timeline: of a run that takes some time.
        path: where to, .png, .pdf or .svg.
        unit: of time, for the axis.
    """
    p, _, chunks = timeline.sizes
    length = float(timeline.makespan)
    figure = new_figure(10.0, min(1.7 + 0.42 * p, 16.0))
    axes = figure.subplots()
    shortest = min(float(span.end - span.start) for spans in timeline.spans for span in spans) / length
    numbered, line = shortest > 0.011, 0.8 if shortest > 0.011 else 0.3 if shortest > 0.004 else 0.0
    hatched: dict[str, Any] = {"facecolor": "0.96", "edgecolor": "0.75", "hatch": "////", "linewidth": 0}
    for stage, spans in enumerate(timeline.spans):
        row = (stage - 0.4, 0.8)
        axes.broken_barh(_gaps(spans, length), row, **hatched)
        for kind, chunk in sorted({(span.action.kind, span.action.chunk) for span in spans}):
            these = [span for span in spans if (span.action.kind, span.action.chunk) == (kind, chunk)]
            bars = [(float(span.start), float(span.end - span.start)) for span in these]
            fill = _paler(KIND_COLOURS[kind], chunk, chunks)
            axes.broken_barh(bars, row, facecolor=fill, edgecolor="white", linewidth=line)
            ink = "white" if sum(fill) < 1.5 else "black"
            for span in these if numbered else ():
                x, number = float(span.start + span.end) / 2, str(span.action.microbatch)
                axes.text(x, stage, number, color=ink, size=8, ha="center", va="center_baseline")
    axes.set_xlim(0, length)
    axes.set_ylim(p - 0.5, -0.5)  # stage 0 on top
    rows = range(0, p, -(-p // 32))  # a name for each row while they can be read
    axes.set_yticks(rows, [f"stage {stage}" for stage in rows])
    axes.set_xlabel(f"time ({unit})" if unit else "time")
    axes.set_title(title, loc="left")
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    idle = [100 * float(1 - busy) for busy in timeline.utilisation]
    right.set_yticks(rows, [f"{idle[stage]:.0f} % idle, {timeline.peak_live[stage]} live" for stage in rows])
    for side in (axes, right):
        side.tick_params(axis="y", length=0)
        side.spines[:].set_visible(False)
    kinds = {span.action.kind for spans in timeline.spans for span in spans}
    key = [Patch(color=KIND_COLOURS[kind], label=KIND_NAMES[kind]) for kind in KIND_COLOURS if kind in kinds]
    if chunks > 1:
        key.append(Patch(color=_paler(KIND_COLOURS["F"], chunks - 1, chunks), label="later chunks paler"))
    key.append(Patch(**hatched, label="bubble"))
    figure.legend(handles=key, frameon=False, ncols=len(key), loc="outside lower center")
    figure.savefig(path, dpi=150)


def _paler(colour: str, chunk: int, chunks: int) -> tuple[float, float, float]:
    """Return the colour of a chunk: mixed with up to 55 % of white."""
    white = 0.55 * chunk / max(chunks - 1, 1)
    red, green, blue = (c + (1 - c) * white for c in to_rgb(colour))
    return red, green, blue


def _gaps(spans: Sequence[Span], length: float) -> list[tuple[float, float]]:
    """Return (start, length) of the time that a stage idles."""
    ends = [0.0, *(float(span.end) for span in spans)]
    starts = [*(float(span.start) for span in spans), length]
    return [(end, start - end) for end, start in zip(ends, starts) if start > end]


def precision_histograms(policy: PrecisionPolicy, path: Path) -> None:
    """Draw how large values and gradients are, in powers of two, over float16's range; save the picture.

    Three panels: values, gradients as they are, and gradients multiplied by the loss scale.

    Args:
        policy: one that has decided.
        path: where to, .png, .pdf or .svg.
    """
    shift = round(math.log2(policy.scale))
    panels = (
        ("values", policy.values, 0),
        ("gradients", policy.gradients, 0),
        (f"gradients × loss scale 2^{shift}", policy.gradients, shift),
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
