"""`minipar compare RUN…`: runs side by side, their loss curves in one picture, and how their speed scales with ranks.

Runs of one model on different numbers of ranks are a curve of throughput, held against the ideal line through its
run with the fewest ranks. Where runs differ in more than their layout (batch, width, …) they are different curves.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from minipar.commands.report import console
from minipar.errors import DataError, UsageError
from minipar.plot import loss_curves, scaling_curve, smoothed
from minipar.runs import read_history

# Settings that say what is computed, whatever the layout; the others do not change how much work a step is.
WORK = (
    "model", "data", "batch", "seq_len", "vocab", "width", "layers", "heads", "tied", "patch", "norm",
    "optimizer", "recompute", "dtype", "amp", "precision_policy", "device",
)  # fmt: skip
# Of these, whether there is any: a probability of 0.2 is as much work as one of 0.1.
SWITCHES = ("dropout", "momentum", "weight_decay", "clip")
WIDTH = 130  # of what is no terminal


@dataclass(frozen=True)
class Past:
    """A run as its directory tells it.

    Attributes:
        speed: samples a second of the median step, the first left out.
        layout: what of the axes, ZeRO and schedule is not the default, in words.
    """

    name: str
    config: dict[str, Any]
    ranks: int
    layout: str
    first: int
    losses: list[float]
    speed: float
    validation: float | None

    @property
    def work(self) -> tuple[Any, ...]:
        """What runs that are points of one scaling curve have in common."""
        same = [self.config.get(key) for key in WORK]
        return *same, *(bool(self.config.get(key)) for key in SWITCHES)


def past_run(directory: Path, name: str) -> Past:
    """Return a run, finished or not.

    Raises:
        UsageError: the directory holds none, or one that has not taken a step.
        DataError: a file in it is damaged.
    """
    facts, lines = read_history(directory)
    if not lines:
        raise UsageError(f"{directory} holds a run that has not taken a step yet")
    c = facts["config"]
    words = [f"{axis} {c[axis]}" for axis in ("dp", "pp", "tp") if (c.get(axis) or 1) > 1]
    words += [f"ZeRO {c['zero']}"] if c.get("zero") else []
    words += [str(c["schedule"])] if c.get("schedule") else []
    speed = statistics.median(line["samples_per_s"] for line in lines[1:] or lines)
    valid = facts["validation"]["loss"] if facts["validation"] else None
    losses = [line["loss"] for line in lines]
    return Past(name, c, facts["ranks"], " × ".join(words), lines[0]["step"], losses, speed, valid)


def scaling(runs: Sequence[Past]) -> dict[str, dict[int, float]]:
    """Return {curve: {ranks: samples a second}} of runs of the same work on two numbers of ranks or more.

    Of several runs on one number of ranks the fastest counts. A curve goes by its model, and where there are several
    of one model by the name of its first run as well.
    """
    groups: dict[tuple[Any, ...], list[Past]] = {}
    for run in runs:
        groups.setdefault(run.work, []).append(run)
    kept = [group for group in groups.values() if len({run.ranks for run in group}) > 1]
    models = [group[0].config["model"] for group in kept]
    curves = {}
    for group, model in zip(kept, models):
        points: dict[int, float] = {}
        for run in group:
            points[run.ranks] = max(run.speed, points.get(run.ranks, 0.0))
        curves[model if models.count(model) == 1 else f"{model}, {group[0].name}"] = points
    return curves


def compare_command(directories: Sequence[Path], png: Path) -> None:
    """Print the runs' table and draw the pictures.

    Raises:
        UsageError: no runs there, or a picture that cannot be written.
        DataError: a run whose files are damaged.
    """
    names = [str(directory) for directory in directories]
    runs = [past_run(directory, name) for directory, name in zip(directories, names) if names.count(name) == 1]
    if len(runs) < len(names):
        raise UsageError("compare: give each run once")
    screen = console()
    if not screen.is_terminal:
        screen.width = WIDTH
    screen.print(runs_table(runs))
    curves = scaling(runs)
    speeds = png.with_name(f"{png.stem}-scaling{png.suffix}")
    try:
        loss_curves({run.name: run.losses for run in runs}, png, first={run.name: run.first for run in runs})
        if curves:
            scaling_curve(curves, speeds)
    except (OSError, ValueError) as error:
        raise DataError(f"{png} cannot be written: {error}") from None
    more = f", {speeds}" if curves else "; the same work on several numbers of ranks would be a scaling curve, too"
    screen.print(f"pictures: {png}{more}", markup=False, soft_wrap=True)


def runs_table(runs: Sequence[Past]) -> Table:
    """Return the table of runs; "of ideal" is against the run of the same work with the fewest ranks."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("model", "ranks", "layout", "steps", "loss", "validation", "samples/s", "of ideal"):
        table.add_column(heading, justify="left" if heading in ("model", "layout") else "right")
    for run in runs:
        alike = [other for other in runs if other.work == run.work]
        least = max(alike, key=lambda other: (-other.ranks, other.speed))
        ideal = least.speed * run.ranks / least.ranks
        table.add_row(
            run.name, str(run.config["model"]), str(run.ranks), run.layout, str(run.first - 1 + len(run.losses)),
            f"{smoothed(run.losses)[-1]:.3f}", "" if run.validation is None else f"{run.validation:.3f}",
            f"{run.speed:,.0f}", f"{run.speed / ideal:.0%}" if len(alike) > 1 else "",
        )  # fmt: skip
    return table
