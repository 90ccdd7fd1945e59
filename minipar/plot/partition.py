"""Pictures of who holds what: parameters laid over devices."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from minipar.parallel.partition.assignment import KINDS, Assignment
from minipar.plot.figure import COLOURS, new_figure


def partition_bars(assignment: Assignment, path: Path) -> None:
    """Draw `partition_figure` and save it.

    Args:
        path: where to, .png, .pdf or .svg.
    """
    partition_figure(assignment).savefig(path, dpi=150)


def partition_figure(assignment: Assignment) -> Figure:
    """Return a picture of what each device holds, in bytes by kind of layer, and of its share of the cost.

    Args:
        assignment: as a partition policy returns it.
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
    return figure
