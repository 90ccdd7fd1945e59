"""What `minipar plan` does besides predicting: it runs the best layouts here (--run-top), and draws (--png)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from minipar.commands.report import console
from minipar.config import TrainConfig
from minipar.errors import DataError
from minipar.parallel.pipeline.simulator import Timeline
from minipar.planner.explain import pace_text, seconds_text, step_parts
from minipar.planner.layout import Layout
from minipar.planner.plan import Plan
from minipar.planner.reference import CALM
from minipar.planner.run_layouts import config_of, run_layouts
from minipar.planner.step_time import predict
from minipar.plot import gantt_pair, memory_bars, plan_comparison
from minipar.units import bytes_text

SHOWN = 10  # layouts in the table and the pictures


@dataclass(frozen=True)
class Measured:
    """Predictions held against runs: seconds by layout, and the first pipeline's timelines, if there was one."""

    measured: dict[str, float]
    pipeline: tuple[Layout, Timeline, Timeline] | None


def run_best(
    config: TrainConfig, found: Plan, top: int, ranks: int, latency: str | None, bandwidth: str | None
) -> Measured:
    """Run the best layouts here, print predicted beside measured, and return both for pictures.

    Args:
        config: of the model; the layouts' own settings are put in.
        latency, bandwidth: of an imitated network, as `minipar run` takes them.

    Predictions are for the machine's pace at this moment, which the reference step tells.
    """
    chosen = found.candidates[:top]
    configs = [config_of(config, c.layout, found.precision) for c in chosen]
    runs = run_layouts(configs, ranks, latency, bandwidth)
    pace = runs.pace(found.machine, found.shape.model)
    now = found.machine.paced(pace)
    table = Table(box=None, pad_edge=False)
    table.add_column("layout", overflow="fold")
    for heading in ("predicted", "measured", "error", "memory predicted", "held", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    pipeline = None
    for c, run in zip(chosen, runs.layouts):
        step = predict(found.shape, now, c.layout, found.batch, found.precision)
        if pipeline is None and step.timeline is not None and run.timeline is not None:
            pipeline = c.layout, step.timeline, run.timeline
        pairs = ((step.seconds, run.seconds, seconds_text), (c.memory.total, run.held, bytes_text))
        cells = [(text(a), text(b), f"{100 * (a / b - 1):+.0f} %") for a, b, text in pairs]
        table.add_row(str(c.layout), *itertools.chain(*cells))
    screen = console()
    screen.print()
    screen.print(table)
    screen.print(f"\n{pace_text(pace)}", markup=False, soft_wrap=True)
    measured = [run.seconds for run in runs.layouts]
    best = min(measured)
    slower = 100 * (measured[0] / best - 1)
    verdict = f"is {slower:.0f} % slower than the fastest" if measured[0] > best else "is the fastest"
    screen.print(f"of {len(measured)} that were run, the layout chosen {verdict}", markup=False)
    if (disturbed := max(run.disturbed for run in runs.layouts)) > CALM:
        screen.print(
            f"other programs had the ranks' cores for up to {100 * disturbed:.0f} % of these steps: measured times are"
            " too long, and the comparison means little",
            soft_wrap=True,
        )  # fmt: skip
    return Measured({str(c.layout): s for c, s in zip(chosen, measured)}, pipeline)


def draw_plan(found: Plan, path: Path, ran: Measured | None) -> None:
    """Draw the comparison into `path`, the memory of the same layouts beside it, as …-memory; and of layouts that
    were run, the first pipeline as …-timeline, predicted above measured.
    """
    shown = found.candidates[:SHOWN]
    title = f"{found.shape.model}, {found.ranks} ranks of {found.machine.name}"
    drawn = [path, *(path.with_name(f"{path.stem}-{what}{path.suffix}") for what in ("memory", "timeline"))]
    measured = None if ran is None else ran.measured
    try:
        plan_comparison({str(c.layout): step_parts(c) for c in shown}, path, measured=measured, title=title)
        memory_bars({str(c.layout): vars(c.memory) for c in shown}, drawn[1], limit=found.limit, title=title)
        if ran is not None and ran.pipeline is not None:
            layout, predicted, run = ran.pipeline
            gantt_pair(predicted, run, drawn[2], title=f"{found.shape.model}, {layout}", unit="s")
        else:
            del drawn[2]
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None
    console().print(f"\npictures: {', '.join(map(str, drawn))}", markup=False, soft_wrap=True)
