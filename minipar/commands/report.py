"""What the commands print: progress while training, tables at the end. Only rank 0 prints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from minipar.doctor import Finding
from minipar.training import StepRecord
from minipar.verification import Report

TERMINAL = "MINIPAR_TERMINAL"  # set by our launcher: what mpirun forwards ends in a terminal of this width


def console() -> Console:
    """Return where to print: standard output, as a terminal if it is one, directly or through mpirun."""
    width = os.environ.get(TERMINAL)
    return (
        Console(force_terminal=True, width=int(width), highlight=False) if width else Console(highlight=False)
    )


def progress(records: Iterable[StepRecord], steps: int, screen: Console) -> Iterator[StepRecord]:
    """Pass records through, showing a bar in a terminal and about twenty lines anywhere else."""
    if not screen.is_terminal:
        every = max(steps // 20, 1)
        for r in records:
            if r.step % every == 0 or r.step in (1, steps):
                left = r.seconds / r.step * (steps - r.step)
                screen.print(f"step {r.step:>{len(str(steps))}}/{steps}  {_facts(r)}  {left:4.0f} s left")
            yield r
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=screen, refresh_per_second=4) as bar:
        task = bar.add_task("training", total=steps, facts="")
        for r in records:
            bar.update(task, completed=r.step, facts=_facts(r))
            yield r


def _facts(r: StepRecord) -> str:
    return f"loss {r.loss:.3f}  {r.samples_per_s:6.0f} samples/s"


def verify_table(report: Report, title: str) -> Table:
    """Return the table of a verification: relative errors, and where the worst of each kind was."""
    table = Table(title=title, title_justify="left")
    for heading, justify in (
        ("compared", "left"),
        ("worst", "right"),
        ("allowed", "right"),
        ("", "left"),
        ("where", "left"),
    ):
        table.add_column(heading, justify=justify, no_wrap=heading != "where")  # type: ignore[arg-type]
    for kind, worst in report.worst.items():
        equal = worst.compared and worst.error <= report.tolerance
        verdict = "[green]equal[/]" if equal else "[bold red]DIFFERS[/]"
        where = f"{worst.where} (of {worst.compared} tensors)" if worst.compared else "nothing was compared"
        table.add_row(kind, f"{worst.error:.1e}", f"{report.tolerance:.0e}", verdict, where)
    same = report.replicas_differ == 0
    verdict = "[green]equal[/]" if same else "[bold red]DIFFER[/]"
    found = "on all ranks" if same else f"{report.replicas_differ} parameters on some step"
    table.add_row("replicas", "bitwise", "bitwise", verdict, found)
    return table


def doctor_table(findings: list[Finding]) -> Table:
    """Return the table of what `doctor` found."""
    table = Table(show_header=False, box=None)
    for f in findings:
        table.add_row("[green]ok[/]" if f.well else "[bold red]!![/]", f.subject, f.found)
        if not f.well:
            table.add_row("", "", f"[yellow]fix: {f.fix}[/]")
    return table


def say(screen: Console, lines: dict[str, Any]) -> None:
    """Print facts as aligned pairs."""
    width = max(map(len, lines))
    for name, value in lines.items():
        screen.print(f"{name:<{width}}  {value}", markup=False)
