"""`minipar schedule`: look at a pipeline schedule before anything runs, one of those built in or your own.

Prints the timeline, the bubble and the activations that each stage holds, beside what the papers' formulas
give, and writes the schedule as CSV and the timeline as a picture.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minipar.commands.report import console, say
from minipar.errors import DataError, UsageError
from minipar.parallel.pipeline.checker import Report, checked
from minipar.parallel.pipeline.formulas import FORMULAS
from minipar.parallel.pipeline.resolve import is_file, known_schedule
from minipar.parallel.pipeline.schedules import build_schedule
from minipar.parallel.pipeline.simulator import Cost, Costs, Timeline, simulate
from minipar.parallel.pipeline.text import read_csv, write_csv
from minipar.plot import gantt
from minipar.timeline import legend, reading, timeline_text

STAGES, MICROBATCHES = 4, 8
PICTURES = (".png", ".pdf", ".svg")


def schedule_command(
    name: str,
    stages: int | None = None,
    microbatches: int | None = None,
    chunks: int | None = None,
    costs: str | None = None,
    csv: Path | None = None,
    png: Path | None = None,
    screen: Console | None = None,
) -> Timeline:
    """Print a schedule's timeline and measures; return the timeline.

    Args:
        name: of a built-in schedule, or the path of a CSV file with one, which then says the sizes.
        stages, microbatches, chunks: 4, 8, and 2 for interleaved or else 1, if not given.
        costs: "F,I,W" or "F,I,W,message" in any unit of time, decimal numbers or fractions; "1,1,1,0" if not
            given.
        csv: where to write the schedule, one line a stage.
        png: where to draw the timeline, .png, .pdf or .svg.

    Raises:
        UsageError: unknown names, sizes that the schedule cannot have, a mistake in the CSV file.
        DataError: files that cannot be read or written.
    """
    prices = parse_costs(costs or "1,1,1,0")
    for path in (csv, png):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"schedule: there is no directory {path.parent} to write {path.name} in")
    if png is not None and png.suffix.lower() not in PICTURES:
        raise UsageError(f"schedule: --png {png}: a picture's name ends in {', '.join(PICTURES)}")
    if is_file(name):
        schedule = read_csv(Path(name))
    else:
        p, m = STAGES if stages is None else stages, MICROBATCHES if microbatches is None else microbatches
        known_schedule(name)
        schedule = build_schedule(name, p, m, chunks)
    report, timeline = checked(schedule), simulate(schedule, prices)
    for what, given, found in zip(
        ("stages", "microbatches", "chunks"), (stages, microbatches, chunks), report.sizes
    ):
        if given not in (None, found):
            raise UsageError(
                f"schedule: {given} {what} were asked for, and {name} has {found}; leave the option out"
            )
    _show(name, timeline, report, prices, screen or console())
    if csv is not None:
        write_csv(schedule, csv)
    if png is not None:
        try:
            gantt(timeline, png, title=f"{_title(name, timeline)}: bubble {_percent(timeline.bubble)}")
        except OSError as error:
            raise DataError(f"{png} cannot be written: {error.strerror}") from None
    return timeline


def parse_costs(text: str) -> Costs:
    """Return the costs that "F,I,W" or "F,I,W,message" says, exactly."""
    try:
        numbers = [Fraction(word.strip()) for word in text.split(",")]
    except (ValueError, ZeroDivisionError):
        numbers = []
    if len(numbers) not in (3, 4) or min(numbers[:3]) <= 0 or min(numbers) < 0:
        raise UsageError(
            f"schedule: --costs {text} is not F,I,W or F,I,W,message; give times such as 1,1,1 or 1,1.2,0.8,0.1,"
            " more than 0 for F, I and W"
        )
    return Costs(*numbers)


def _show(name: str, timeline: Timeline, report: Report, costs: Costs, screen: Console) -> None:
    p, m, v = timeline.sizes
    work = f"F {_number(costs.forward)}, I {_number(costs.input)}, W {_number(costs.weight)}"  # type: ignore[arg-type]
    both = _number(costs.input + costs.weight)  # type: ignore[operator]
    screen.print(f"[bold]{_title(name, timeline)}[/]")
    screen.print(f"costs {work} (B = I + W = {both}), message {_number(costs.message)}\n")  # type: ignore[arg-type]
    screen.print(timeline_text(timeline, screen.width))
    screen.print(reading(timeline, screen.width))
    screen.print(legend({span.action.kind for spans in timeline.spans for span in spans}))
    formula = FORMULAS.get(name)
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "busy", "bubble", "live activations", "formula", "receive buffers"):
        table.add_column(heading, justify="right")
    for stage in range(p):
        busy, live = timeline.utilisation[stage], timeline.peak_live[stage]
        expected = str(formula.live(stage, p, m, v)) if formula else "–"
        buffers = str(report.receive_buffers[stage]) if report.receive_buffers else "–"
        table.add_row(str(stage), _percent(busy), _percent(1 - busy), str(live), expected, buffers)
    screen.print()
    screen.print(table)
    screen.print()
    facts = {"makespan": _number(timeline.makespan), "bubble": _with_percent(timeline.bubble)}
    if formula:
        facts["formula"] = _formula(name, timeline, costs)
        same = all(n == formula.live(s, p, m, v) for s, n in enumerate(timeline.peak_live))
        facts["live"] = f"{formula.live_text} on stage s, {'equal' if same else 'DIFFERENT'}"
    say(screen, facts)


def _formula(name: str, timeline: Timeline, costs: Costs) -> str:
    formula, sizes = FORMULAS[name], timeline.sizes
    needs = []
    if costs.message:
        needs.append("messages that cost nothing")
    if formula.needs_equal_costs and not costs.forward == costs.input == costs.weight:
        needs.append("F = I = W")
    if not formula.holds(*sizes):
        needs.append(formula.condition)
    value = formula.bubble(*sizes)
    if needs:
        return f"{formula.bubble_text} = {_with_percent(value)}, which needs {' and '.join(needs)}"
    verdict = "equal" if value == timeline.bubble else "DIFFERENT"
    return f"{formula.bubble_text} = {_with_percent(value)}, {verdict}"


def _title(name: str, timeline: Timeline) -> str:
    p, m, v = timeline.sizes
    words = [
        f"{n} {what}{'s' if n > 1 else ''}" for n, what in ((p, "stage"), (m, "microbatch"), (v, "chunk"))
    ]
    return f"{Path(name).name}: {', '.join(words if v > 1 else words[:2])}".replace("microbatchs", "microbatches")


def _number(x: Cost) -> str:
    return f"{float(x):.6g}"


def _percent(x: Cost) -> str:
    return f"{100 * float(x):.1f} %"


def _with_percent(x: Cost) -> str:
    exact = isinstance(x, Fraction) and 1 < x.denominator < 10_000
    return f"{x} = {_percent(x)}" if exact else _percent(x)
