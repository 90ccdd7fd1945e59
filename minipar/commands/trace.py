"""`minipar trace`: what the trace of a run says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # imported where it is used: `minipar --help` needs none of it
    from rich.table import Table

    from minipar.traces.file import RunTrace
    from minipar.traces.report import TraceReport

trace_app = typer.Typer(help="Look at what every rank of a run did, and when.", no_args_is_help=True)


@trace_app.callback()
def about() -> None:
    """Look at what every rank of a run did, and when."""


@trace_app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="directory of a run made with train --trace")],
) -> None:
    """Print where each rank's time went, how much communication was hidden, and what holds the run back.

    Example: minipar trace show runs/last
    """
    from minipar.agreement import agreed
    from minipar.comm import world
    from minipar.commands.report import console
    from minipar.errors import DataError
    from minipar.traces.advice import advice
    from minipar.traces.file import read
    from minipar.traces.report import examine

    comm, path = world(), directory / "trace.json"
    trace = agreed(comm, lambda: read(path) if comm.rank == 0 else None)
    if trace is None:
        return
    report = examine(trace)
    if report is None:
        raise DataError(f"{path} holds no whole step")
    screen = console()
    each = report.seconds / report.steps * 1e3
    screen.print(f"{trace.facts.get('run', path)}: {report.steps} steps of {each:.1f} ms", markup=False)
    screen.print(ranks_table(report))
    screen.print(losses_table(report, trace))
    if report.traffic:
        screen.print(traffic_table(report))
    if report.bubble is not None:
        screen.print(f"bubble: {report.bubble:.1%} of the pipeline's time, mean over stages", markup=False)
    screen.print(f"imbalance: the busiest rank, {report.busiest}, works {report.imbalance:.1%} longer than the mean")
    if max(trace.facts["clock_error"]) > 0 and len(set(trace.facts["process"])) > 1:
        error = max(trace.facts["clock_error"]) * 1e6
        screen.print(f"clocks: of different ranks aligned to ±{error:.0f} µs", markup=False)
    for sentence in advice(report, trace.facts):
        screen.print(sentence, markup=False)


def ranks_table(report: TraceReport) -> Table:
    """Return the table of shares, which add up to the whole time: a line a rank, and their mean."""
    from rich.table import Table

    from minipar.traces.report import SHARES

    shown = [name for name in SHARES if name != "stages" or report.share("stages") > 0]
    titles = {
        "work": "work", "data": "data", "others": "waits:\nothers", "transfer": "transfer",
        "stages": "waits:\nstages", "rest": "rest",
    }  # fmt: skip
    table = Table()
    for title in ("rank", *(titles[name] for name in shown)):
        table.add_column(title, justify="right")
    for rank in range(len(report.ranks)):
        table.add_row(str(rank), *(f"{report.share(name, rank):.1%}" for name in shown))
    if len(report.ranks) > 1:
        table.add_section()
        table.add_row("mean", *(f"{report.share(name):.1%}" for name in shown))
    return table


def losses_table(report: TraceReport, trace: RunTrace) -> Table:
    """Return what follows from the shares, and memory: a line a rank."""
    from rich.table import Table

    table = Table()
    on_gpu, piped = max(trace.facts["gpu_memory"]) > 0, report.bubble is not None
    columns = ["rank", "exposed", "hidden\nat most", "work\nagainst mean"]
    columns += (["bubble"] if piped else []) + ["peak\nmemory"] + (["peak GPU\nmemory"] if on_gpu else [])
    for title in columns:
        table.add_column(title, justify="right")
    alike = len(set(trace.facts["process"])) < len(report.ranks)
    for rank, times in enumerate(report.ranks):
        cells = [f"{report.share(name, rank):.1%}" for name in ("exposed", "hidden")]
        cells.append(f"{report.excess(rank):+.1%}")
        cells += [f"{times.bubble:.1%}" if times.bubble is not None else ""] if piped else []
        for kind in ("peak_memory", "gpu_memory") if on_gpu else ("peak_memory",):
            cells.append("shared" if alike and rank else f"{trace.facts[kind][rank] / 2**20:.0f} MiB")
        table.add_row(str(rank), *cells)
    return table


def traffic_table(report: TraceReport) -> Table:
    """Return the table of communication: a line an operation and group, means over the ranks of the run."""
    from rich.table import Table

    from minipar.units import bytes_text

    table = Table()
    for title in ("operation", "group", "calls", "bytes a call", "exposed", "transfer"):
        table.add_column(title, justify="left" if title in ("operation", "group") else "right")
    parts = report.steps * len(report.ranks)
    for (operation, group), row in sorted(report.traffic.items(), key=lambda item: -item[1].exposed):
        exposed, transfer = (f"{seconds / parts * 1e3:.2f} ms" for seconds in (row.exposed, row.transfer))
        size = bytes_text(row.bytes / row.calls) if row.calls else ""
        message = operation in ("send", "recv")
        table.add_row(operation, group, f"{row.calls / parts:.3g}", size, exposed, "" if message else transfer)
    table.caption = "a rank and step"
    return table
