"""Pictures of a pipeline's timeline, predicted or measured, and of one above the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minipar.parallel.pipeline.simulator import Span, Timeline
from minipar.plot.figure import new_figure
from minipar.timeline import KIND_COLOURS, KIND_NAMES


def gantt(timeline: Timeline, path: Path, *, title: str = "", unit: str = "") -> Figure:
    """Draw a pipeline's timeline, predicted or measured; save the picture and return it.

    A row is a stage; bars carry their microbatch where there is room, and are paler for each further chunk.
    The bubble is hatched. On the right: how much of the time a stage idles, and the most activations it holds.

    Args:
        timeline: of a run that takes some time.
        path: where to, .png, .pdf or .svg.
        unit: of time, for the axis.
    """
    p = timeline.sizes.stages
    length = float(timeline.makespan)
    figure = new_figure(10.0, min(1.7 + 0.42 * p, 16.0))
    key = _draw(timeline, figure.subplots(), length, title, unit)
    figure.legend(handles=key, frameon=False, ncols=len(key), loc="outside lower center")
    figure.savefig(path, dpi=150)
    return figure


def gantt_pair(
    predicted: Timeline, measured: Timeline, path: Path, *, title: str = "", unit: str = ""
) -> Figure:
    """Draw a predicted timeline above the measured one of the same schedule, on one axis of time; save and return it.

    Both as `gantt` draws them; what differs in length is where prediction and run part.

    Args:
        predicted, measured: timelines in the same unit of time.
        path: where to, .png, .pdf or .svg.
    """
    length = max(float(predicted.makespan), float(measured.makespan))
    rows = predicted.sizes.stages
    figure = new_figure(10.0, min(2.4 + 0.84 * rows, 18.0))
    error = float(predicted.makespan) / float(measured.makespan) - 1
    key: list[Patch] = []
    for axes, timeline, name in zip(
        figure.subplots(2, 1, sharex=True), (predicted, measured), ("predicted", "measured")
    ):
        told = f"{name}: {float(timeline.makespan):.3g}{f' {unit}' if unit else ''}"
        told += f" ({100 * error:+.1f} %)" if name == "predicted" else ""
        key = _draw(timeline, axes, length, told, unit if name == "measured" else None)
    if title:
        figure.suptitle(title)
    figure.legend(handles=key, frameon=False, ncols=len(key), loc="outside lower center")
    figure.savefig(path, dpi=150)
    return figure


def _draw(timeline: Timeline, axes: Any, length: float, title: str, unit: str | None) -> list[Patch]:
    """Draw one timeline over `length` units of time; return the key. A unit of None leaves the axis unnamed."""
    p, _, chunks = timeline.sizes
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
    if unit is not None:
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
    return key


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
