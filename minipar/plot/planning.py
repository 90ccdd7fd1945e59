"""Pictures of plans: memory by kind on each rank, and layouts compared by what their step is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from minipar.plot.figure import COLOURS, new_figure

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")  # beside colours, for print


def memory_bars(
    ranks: Mapping[str, Mapping[str, float]], path: Path, *, limit: float | None = None, title: str = ""
) -> Figure:
    """Draw what each rank holds, in bytes by kind, one bar a rank; save the picture and return it.

    Args:
        ranks: {rank or layout: {kind: bytes}}.
        path: where to, .png, .pdf or .svg.
        limit: bytes that a rank may hold, drawn as a line.
    """
    largest = max([sum(kinds.values()) for kinds in ranks.values()] + [limit or 0.0])
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
    unit, name = next((unit for unit in units if largest >= unit[0]), units[-1])
    rows = {rank: {kind: n / unit for kind, n in kinds.items()} for rank, kinds in ranks.items()}
    return _stacked(rows, path, f"memory ({name})", title, None if limit is None else (limit / unit, "limit"))


def plan_comparison(
    layouts: Mapping[str, Mapping[str, float]],
    path: Path,
    *,
    measured: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Draw the predicted step of some layouts by what it is spent on, the measured one as a diamond; save and return.

    Args:
        layouts: {layout: {part: seconds}}, the best first.
        path: where to, .png, .pdf or .svg.
        measured: {layout: seconds}, where they were run.
    """
    longest = max(sum(parts.values()) for parts in layouts.values())
    unit, name = (1.0, "s") if longest >= 1 else (1e-3, "ms")
    rows = {layout: {part: t / unit for part, t in parts.items()} for layout, parts in layouts.items()}
    points = {layout: t / unit for layout, t in (measured or {}).items()}
    return _stacked(rows, path, f"step ({name})", title, points=points)


def _stacked(
    rows: Mapping[str, Mapping[str, float]],
    path: Path,
    label: str,
    title: str,
    limit: tuple[float, str] | None = None,
    points: Mapping[str, float] | None = None,
) -> Figure:
    names = list(rows)
    kinds = list(dict.fromkeys(kind for parts in rows.values() for kind, n in parts.items() if n))
    figure = new_figure(9.0, 1.6 + 0.36 * len(names))
    axes = figure.subplots()
    left = [0.0] * len(names)
    for i, kind in enumerate(kinds):
        widths = [rows[name].get(kind, 0.0) for name in names]
        colour, hatch = COLOURS[i % len(COLOURS)], HATCHES[i % len(HATCHES)]
        axes.barh(names, widths, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=kind)
        left = [a + b for a, b in zip(left, widths)]
    if points:
        shown = [(points[name], y) for y, name in enumerate(names) if name in points]
        axes.plot(*zip(*shown), "D", color="black", markersize=6, label="measured")
    if limit is not None:
        axes.axvline(limit[0], color="black", linestyle="--", linewidth=1, label=limit[1])
    axes.invert_yaxis()  # the first on top
    axes.set_xlabel(label)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles, texts = axes.get_legend_handles_labels()
    figure.legend(handles, texts, frameon=False, ncols=3, fontsize=8, loc="outside lower center")
    figure.savefig(path, dpi=150)
    return figure
