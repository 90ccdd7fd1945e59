"""`minipar lessons`, `minipar start` and `minipar grade`: from the list to full points."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from minipar.commands.report import console
from minipar.errors import DataError, UsageError
from minipar.grading.manifest import Entry, find_entry, read_manifest
from minipar.grading.progress import note, reached

Number = Annotated[str, typer.Argument(metavar="NN", help="the lesson's number, e.g. 04")]


def lessons() -> None:
    """List the lessons: what each answers, what it builds on, and the points reached.

    Example: minipar lessons
    """
    show_lessons()


def start(
    lesson: Number,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where exercise.py is copied to")],
) -> None:
    """Copy a lesson's exercise out, to work on it.

    Example: minipar start 04 my/04
    """
    start_exercise(lesson, directory)


def grade(
    lesson: Number,
    file: Annotated[
        Path | None, typer.Option(help="the exercise (default: ./exercise.py, else where start put it)")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="write Gradescope's results.json here")
    ] = None,
) -> None:
    """Grade an exercise: a table of points, and for what is missing the reason and the next step.

    Ends with 0 for full points, 1 for less.

    Example: minipar grade 04 --file my/04/exercise.py
    """
    if not grade_file(lesson, file, json_path):
        raise typer.Exit(1)


def show_lessons() -> None:
    """Print every lesson with its question, the points reached and what it builds on."""
    table = Table(show_lines=True)
    for heading in ("", "lesson", "points", "builds on"):
        table.add_column(
            heading, no_wrap=heading != "lesson", justify="right" if heading == "points" else "left"
        )
    for entry in read_manifest():
        points = reached(entry).points
        got = "–" if points is None else f"{points:g}"
        colour = "green" if points is not None and points >= entry.points else ""
        before = " ".join(f"{number:02}" for number in entry.prerequisites)
        text = f"[bold]{entry.title}[/]\n{entry.question}"
        table.add_row(f"{entry.number:02}", text, f"{got} / {entry.points:g}", before, style=colour)
    screen = console()
    screen.print(table)
    screen.print(
        "Read lessons/NN_…/walkthrough.ipynb (make lessons), then: minipar start NN DIR", markup=False
    )


def start_exercise(lesson: str, directory: Path) -> None:
    """Copy a lesson's exercise to `directory`/exercise.py and say what to do next.

    Raises:
        UsageError: the exercise is there already, or the directory cannot be made.
    """
    entry = find_entry(lesson)
    source, target = entry.file("exercise.py"), directory / "exercise.py"
    if target.exists():
        raise UsageError(f"{target} exists already: it stays as it is; choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from None
    keep(entry, exercise=target.resolve())
    screen = console()
    screen.print(f"{target} is yours to write: {entry.question}", markup=False, soft_wrap=True)
    screen.print(f"read first  {entry.folder / 'walkthrough.ipynb'}", markup=False, soft_wrap=True)
    screen.print(f"then        minipar grade {entry.number:02} --file {target}", markup=False, soft_wrap=True)


def grade_file(lesson: str, file: Path | None, json_path: Path | None) -> bool:
    """Grade an exercise, print the table, and return whether it got all points.

    Args:
        file: by default ./exercise.py, else the one that `start` made.
        json_path: where to write Gradescope's results.json.

    Raises:
        UsageError: no such lesson or file, or no such directory for the JSON.
    """
    from minipar.grading import result as result_module  # brings the sandbox, which no other command needs

    entry = find_entry(lesson)
    path = chosen_file(entry, file)
    if json_path is not None and not json_path.parent.is_dir():
        raise UsageError(f"--json {json_path}: there is no directory {json_path.parent}")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    result = result_module.grade(entry, [(str(path), source)])
    if json_path is not None:
        json_path.write_text(json.dumps(result.as_gradescope(), indent=1) + "\n", encoding="utf-8")
    screen = console()
    screen.print(result.table())
    if result.printed:
        screen.print("the submission printed:", style="bold")
        screen.print(result.printed.rstrip(), markup=False)
    keep(entry, points=result.points)
    return result.passed


def chosen_file(entry: Entry, file: Path | None) -> Path:
    """Return the file to grade.

    Raises:
        UsageError: there is none; the message says where it was looked for.
    """
    if file is not None:
        if not file.is_file():
            raise UsageError(f"--file {file} is not a file")
        return file
    here = Path("exercise.py")
    started = reached(entry).exercise
    for candidate in (here, started):
        if candidate is not None and candidate.is_file():
            return candidate
    raise UsageError(
        f"no exercise.py here: name one with --file, or begin with `minipar start {entry.number:02} DIR`"
    )


def keep(entry: Entry, points: float | None = None, exercise: Path | None = None) -> None:
    """Note progress; where that cannot be kept, say so and go on, since the result stands by itself."""
    try:
        note(entry, points, exercise)
    except (OSError, DataError, RuntimeError) as error:
        print(f"minipar: progress was not kept: {error}", file=sys.stderr)
