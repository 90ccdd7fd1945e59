"""Schedules as text: one line a stage, one cell an action, as in torch.distributed.pipelining's CSV files.

    0F0,0F1,0B0,0B1          the virtual stage, the kind, the microbatch
    1F0,1B0,1F1,1B1

Write one by hand, in an editor or a spreadsheet (empty cells are idle and are skipped), and read it back: a
mistake is refused with its row, column and reason. With chunks the virtual stage is chunk * stages + row;
sends and receives (`0SEND_F0`, `1RECV_F0`) can be written too, all or none.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from minipar.errors import DataError, UsageError
from minipar.parallel.pipeline.action import (
    COMPUTE,
    RECV_B,
    SEND_F,
    Action,
    Kind,
    Schedule,
    virtual_stage,
)
from minipar.parallel.pipeline.checker import Problem, check

WORD = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|F|B|I|W)(\d+)")


def action_text(action: Action, stages: int) -> str:
    """Return an action as text: `4F2` is the forward of microbatch 2 on virtual stage 4."""
    return f"{virtual_stage(action, stages)}{action.kind}{action.microbatch}"


def parse_action(word: str, stages: int) -> Action:
    """Return the action that a word says. Raises UsageError for a word that is none."""
    match = WORD.fullmatch(word.strip().upper())
    if not match:
        how = "write one as 0F1: virtual stage, F, B, I or W, microbatch"
        raise UsageError(f"{word.strip()!r} is no action; {how}")
    here = int(match[1])
    kind: Kind = match[2]  # type: ignore[assignment]
    peer = None
    if kind not in COMPUTE:
        peer = (here + (1 if kind in (SEND_F, RECV_B) else -1)) % stages
    return Action(kind, int(match[3]), here // stages, here % stages, peer)


def to_csv(schedule: Schedule) -> str:
    """Return a schedule as CSV text, one line a stage."""
    stages = len(schedule)
    return "".join(",".join(action_text(a, stages) for a in actions) + "\n" for actions in schedule)


def from_csv(text: str, name: str = "schedule") -> list[list[Action]]:
    """Return the schedule that CSV text says, checked: it can be carried out to its end.

    Args:
        text: one line a stage; lines at the end may be empty.
        name: what errors call it, the file for instance.

    Raises UsageError with row, column and reason of the first mistake.
    """
    rows = list(csv.reader(io.StringIO(text)))
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    if not rows:
        raise UsageError(f"{name}: there is no schedule in it; write one line for each stage, as 0F0,0B0")
    schedule: list[list[Action]] = []
    columns: list[list[int]] = []  # of each action
    for stage, row in enumerate(rows):
        cells = [(column, cell) for column, cell in enumerate(row, 1) if cell.strip()]
        actions = []
        for column, cell in cells:
            where = f"{name}, row {stage + 1}, column {column}"
            try:
                action = parse_action(cell, len(rows))
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from None
            if action.stage != stage:
                here = virtual_stage(action, len(rows))
                home = f"with {len(rows)} rows virtual stage {here} belongs to row {action.stage + 1}"
                raise UsageError(f"{where}: {cell.strip()} is in the wrong row; {home}")
            actions.append(action)
        schedule.append(actions)
        columns.append([column for column, _ in cells])
    report = check(schedule)
    if report.problems:
        raise UsageError(f"{name}, {_located(report.problems[0], columns, len(rows))}")
    return schedule


def _located(problem: Problem, columns: list[list[int]], stages: int) -> str:
    row = f"row {problem.stage + 1} (stage {problem.stage})"
    if problem.position is not None:
        row += f", column {columns[problem.stage][problem.position]}"
    return f"{row}: {action_text(problem.action, stages)}: {problem.reason}"


def write_csv(schedule: Schedule, path: Path) -> None:
    """Write a schedule to a file. Raises DataError if that cannot be done."""
    try:
        path.write_text(to_csv(schedule), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


def read_text(path: Path) -> str:
    """Return the text of a CSV file. Raises DataError for a file that cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a byte order mark
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text file; a schedule is CSV, one line a stage, as 0F0,0B0") from None


def read_csv(path: Path) -> list[list[Action]]:
    """Return the schedule in a file, checked as by `from_csv`.

    Raises DataError for a file that cannot be read, UsageError with row, column and reason of a mistake.
    """
    return from_csv(read_text(path), str(path))
