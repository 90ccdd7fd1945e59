"""A pipeline's timeline in the terminal: one line a stage, time to the right, a colour for each kind of work.

    Console().print(timeline_text(simulate(one_f_one_b(4, 8)), width=80))

Short timelines carry the microbatch of each action and are wrapped into as many bands as they need. Long ones
are scaled to one band, in which a letter stands for what the stage mostly did in that slice of time. It can
be read without colours too: dots are the bubble.
"""

from __future__ import annotations

import math

from rich.style import Style
from rich.text import Text

from minipar.parallel.pipeline.action import B, F, I, W
from minipar.parallel.pipeline.simulator import Span, Timeline
from minipar.parallel.pipeline.text import action_text

# Okabe and Ito 2008, as in the pictures: told apart by the colour-blind, and by lightness in print.
KIND_COLOURS: dict[str, str] = {F: "#0072B2", B: "#E69F00", I: "#009E73", W: "#F0E442"}
KIND_NAMES: dict[str, str] = {F: "forward", B: "backward", I: "backward, input", W: "backward, weights"}
BUBBLE = "#999999"
MAX_BANDS = 6
MAX_LINES = 60


def kind_style(kind: str) -> Style:
    """Return colours of an action in the terminal: white on dark grounds, black on light ones."""
    return Style(color="#FFFFFF" if kind in (F, I) else "#000000", bgcolor=KIND_COLOURS[kind])


Cell = tuple[str, Style]
IDLE: Cell = ("·", Style(color=BUBBLE))
NOTHING: Cell = (" ", Style())


def timeline_text(timeline: Timeline, width: int = 80, ruler: bool = True) -> Text:
    """Return the timeline in lines of at most `width` characters, with a line of times on top or without."""
    name, room = _columns(timeline, width)
    per_time = _characters_per_time(timeline)
    length = round(timeline.makespan * per_time)
    if is_scaled(timeline, width):
        per_time = float(room / timeline.makespan) if timeline.makespan else 0.0
        rows = [_scaled(stage, per_time, room) for stage in timeline.spans]
    else:
        rows = [_labelled(stage, timeline, per_time, length) for stage in timeline.spans]
        unit = max(round(per_time), 1)  # a band ends between units of time, so that short actions stay whole
        room = room // unit * unit if unit <= room else room
    named = [(f"stage {stage}", cells) for stage, cells in enumerate(rows)]
    if ruler:
        named.insert(0, ("time", _ruler(per_time, max(map(len, rows), default=0))))
    text = Text()
    for start in range(0, len(named[-1][1]), room):
        if start:
            text.append("\n")
        for title, cells in named:
            text.append(title.ljust(name))
            for letter, style in cells[start : start + room]:
                text.append(letter, style)
            text.append("\n")
    return text


def is_scaled(timeline: Timeline, width: int = 80) -> bool:
    """Return whether the timeline is too long to carry microbatches in lines of that width."""
    _, room = _columns(timeline, width)
    length = round(timeline.makespan * _characters_per_time(timeline))
    bands = -(-length // room)
    return not length or bands > MAX_BANDS or bands * (timeline.sizes.stages + 2) > MAX_LINES


def reading(timeline: Timeline, width: int = 80) -> str:
    """Return in words how to read an action in the terminal's timeline."""
    if is_scaled(timeline, width):
        _, room = _columns(timeline, width)
        return f"each letter is what the stage mostly does in {float(timeline.makespan) / room:.3g} units of time"
    if timeline.sizes.chunks > 1:
        p = timeline.sizes.stages
        return f"{p}F1: forward of microbatch 1 on virtual stage {p}, which is chunk 1 of stage 0"
    return "F1: forward of microbatch 1"


def _columns(timeline: Timeline, width: int) -> tuple[int, int]:
    """Return how many characters a stage's name takes, and how many are left for time."""
    name = len(f"stage {timeline.sizes.stages - 1}") + 2
    return name, max(width - name, 20)


def _letters(span: Span, timeline: Timeline) -> str:
    if timeline.sizes.chunks > 1:  # which chunk matters then: the virtual stage says it
        return action_text(span.action, timeline.sizes.stages)
    return f"{span.action.kind}{span.action.microbatch}"


def _characters_per_time(timeline: Timeline) -> float:
    """Return the scale at which every action has room for its letters and a space; 0 if there is none."""
    most = 0.0
    for stage in timeline.spans:
        for span in stage:
            if span.end <= span.start:
                return 0.0
            most = max(most, float((len(_letters(span, timeline)) + 1) / (span.end - span.start)))
    return most


def _ruler(per_time: float, length: int) -> list[Cell]:
    """Return round times, each beginning where it belongs."""
    cells = [NOTHING] * length
    if not per_time:
        return cells
    step = 10.0 ** math.ceil(math.log10(10 / per_time))  # at least ten characters from one to the next
    step = next(s for s in (step / 5, step / 2, step) if s * per_time >= 10)
    for n in range(math.ceil(length / (step * per_time))):
        at = round(n * step * per_time)
        for x, letter in enumerate(f"{n * step:g}", at):
            if x < length:
                cells[x] = letter, IDLE[1]
    return cells


def _labelled(stage: list[Span], timeline: Timeline, per_time: float, length: int) -> list[Cell]:
    unit = max(round(per_time), 1)
    cells = [IDLE if x % unit == 0 else NOTHING for x in range(length)]  # a dot for each unit of time
    for span in stage:
        start, end = round(span.start * per_time), round(span.end * per_time)
        style = kind_style(span.action.kind)
        for x, letter in enumerate(_letters(span, timeline).ljust(end - start - 1, "─") + " ", start):
            if x < length:
                cells[x] = letter, style
    return cells


def _scaled(stage: list[Span], per_time: float, room: int) -> list[Cell]:
    """Return a letter for each slice of time: the kind that fills most of it, a dot if that is the bubble."""
    spent: list[dict[str, float]] = [{} for _ in range(room)]
    for span in stage:
        start, end = float(span.start) * per_time, float(span.end) * per_time
        for x in range(int(start), min(int(end) + 1, room)):
            here = min(end, x + 1) - max(start, x)
            spent[x][span.action.kind] = spent[x].get(span.action.kind, 0.0) + here
    cells = []
    for times in spent:
        kind = max(times, key=lambda k: times[k]) if sum(times.values()) >= 0.5 else ""
        cells.append((kind, kind_style(kind)) if kind else IDLE)
    return cells


def legend(kinds: set[str]) -> Text:
    """Return one line that says what the colours are."""
    text = Text()
    for kind in (F, B, I, W):
        if kind in kinds:
            text.append(f" {kind} ", kind_style(kind)).append(f" {KIND_NAMES[kind]}   ")
    return text.append(*IDLE).append(" bubble")
