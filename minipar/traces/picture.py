"""Draws one step of a trace: what every rank did when, and what was under way in the background meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from minipar.errors import UsageError
from minipar.plot import COLOURS, new_figure
from minipar.timeline import KIND_COLOURS
from minipar.trace import ACTION, BACKWARD, COLLECTIVE, DATA, FLIGHT, FORWARD, OPTIMIZER, WAIT, Span
from minipar.traces.file import RunTrace
from minipar.traces.report import steps_of

# What is drawn over what: communication lies within the work that called it.
LAYERS = (DATA, FORWARD, BACKWARD, OPTIMIZER, ACTION, COLLECTIVE, WAIT)
HEIGHTS = {COLLECTIVE: (-0.4, 0.3), WAIT: (-0.4, 0.3), FLIGHT: (0.24, 0.12)}  # (top, height); else the whole row
FILLS: dict[str, dict[str, Any]] = {
    "forward": {"facecolor": KIND_COLOURS["F"]},
    "backward": {"facecolor": KIND_COLOURS["B"]},
    "backward, input": {"facecolor": KIND_COLOURS["I"]},
    "backward, weights": {"facecolor": KIND_COLOURS["W"]},
    "optimizer": {"facecolor": COLOURS[3]},
    "data": {"facecolor": "0.6"},
    "communication": {"facecolor": COLOURS[1]},
    "waiting": {"facecolor": "1.0", "edgecolor": COLOURS[1], "hatch": "//////", "linewidth": 0.0},
    "in the background": {"facecolor": COLOURS[5]},
    "none of these": {"facecolor": "0.93"},
}
OF_ACTION = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weights"}
OF_KIND = {
    DATA: "data", FORWARD: "forward", BACKWARD: "backward", OPTIMIZER: "optimizer",
    COLLECTIVE: "communication", WAIT: "waiting", FLIGHT: "in the background",
}  # fmt: skip


def label_of(span: Span) -> str:
    """Return the word for a span in the picture's key."""
    return OF_ACTION[span.name[0]] if span.kind == ACTION else OF_KIND[span.kind]


def draw_step(trace: RunTrace, path: Path) -> None:
    """Draw the recorded step of median length and save the picture.

    A row is a rank: its work, in the upper half its blocking communication and its waiting, and as a thin line
    below what was under way in the background. Bars of a pipeline carry their microbatch where there is room.

    Args:
        path: where to, .png, .pdf or .svg.

    Raises:
        UsageError: no whole step was recorded.
    """
    ranks = len(trace.ranks)
    steps = steps_of(trace)[1:] or steps_of(trace)  # the first warms up
    if not steps:
        raise UsageError("the trace holds no whole step, so there is none to draw")
    name, start, end = sorted(steps, key=lambda step: step[2] - step[1])[len(steps) // 2]
    figure = new_figure(10.0, min(1.9 + 0.55 * ranks, 16.0))
    axes = figure.subplots()
    seen = set()
    length = (end - start) * 1e3
    for rank, spans in enumerate(trace.ranks):
        here = [s for s in spans if s.start < end and s.end > start]
        axes.broken_barh([(0, length)], (rank - 0.4, 0.6), **FILLS["none of these"])
        for kind in (*LAYERS, FLIGHT):
            place = HEIGHTS.get(kind, (-0.4, 0.6))
            place = rank + place[0], place[1]
            for label in FILLS:
                these = [s for s in here if s.kind == kind and label_of(s) == label]
                bars = [((s.start - start) * 1e3, (s.end - s.start) * 1e3) for s in these]
                if bars:
                    seen.add(label)
                    line = {"edgecolor": "white", "linewidth": 0.3} if kind == ACTION else {"linewidth": 0.0}
                    axes.broken_barh(bars, place, **{**line, **FILLS[label]})
        for s in here:
            if s.kind == ACTION and (s.end - s.start) * 1e3 > 0.012 * length:
                middle = ((s.start + s.end) / 2 - start) * 1e3
                ink = "white" if s.name[0] in "FI" else "black"
                axes.text(middle, rank + 0.04, s.name[1:], color=ink, size=8, ha="center", va="center")
    axes.set_xlim(0, length)
    axes.set_ylim(ranks - 0.5, -0.5)  # rank 0 on top
    rows = range(0, ranks, -(-ranks // 32))  # a name for each row while they can be read
    axes.set_yticks(rows, [f"rank {rank}" for rank in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("time (ms)")
    axes.set_title(f"{name}: {trace.facts.get('run', '')}", loc="left", fontsize=10)
    key = [Patch(label=label, **fill) for label, fill in FILLS.items() if label in {*seen, "none of these"}]
    figure.legend(handles=key, frameon=False, ncols=min(len(key), 5), loc="outside lower center")
    figure.savefig(path, dpi=150)
