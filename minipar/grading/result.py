"""Grading one submission: every check's points and message, as a table and as Gradescope's results.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from minipar.grading.lesson import Check, Run, Wrong
from minipar.grading.manifest import Entry, load_grader
from minipar.grading.sandbox import Nursery, Submission


@dataclass(frozen=True)
class Verdict:
    """What a check found: points of at most so many, and why not all of them ("" if all)."""

    check: str
    points: float
    most: float
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether it got all points."""
        return self.points >= self.most


@dataclass
class Result:
    """What a submission got for a lesson.

    Attributes:
        printed: what the submission printed, cut.
        seconds: that grading took.
    """

    entry: Entry
    verdicts: list[Verdict] = field(default_factory=list)
    printed: str = ""
    seconds: float = 0.0

    @property
    def points(self) -> float:
        """The points of all checks together."""
        return sum(verdict.points for verdict in self.verdicts)

    @property
    def passed(self) -> bool:
        """Whether every check got all its points."""
        return all(verdict.passed for verdict in self.verdicts)

    def as_gradescope(self) -> dict[str, Any]:
        """Return what Gradescope reads from results.json; times in seconds."""
        output = f"{self.entry.number:02} {self.entry.title}: {self.points:g} of {self.entry.points:g} points"
        if self.printed:
            output += f"\n\nThe submission printed:\n{self.printed}"
        return {
            "score": self.points,
            "output": output,
            "execution_time": round(self.seconds, 3),
            "tests": [
                {
                    "name": verdict.check,
                    "score": verdict.points,
                    "max_score": verdict.most,
                    "output": verdict.message,
                    "status": "passed" if verdict.passed else "failed",
                }
                for verdict in self.verdicts
            ],
        }

    def table(self) -> Table:
        """Return the table of points, messages below their checks."""
        title = f"{self.entry.number:02} {self.entry.title}"
        table = Table(title=title, title_justify="left", show_footer=True, show_lines=True)
        table.add_column("check", footer="all")
        total = f"{self.points:g} / {self.entry.points:g}"
        table.add_column("points", footer=total, justify="right", no_wrap=True)
        before = ""
        for verdict in self.verdicts:
            check = Text(verdict.check)
            if verdict.message:
                message = "(the same)" if verdict.message == before else verdict.message
                check.append(f"\n{message}", style="yellow")
            before = verdict.message
            style = "green" if verdict.passed else "bold red"
            table.add_row(check, Text(f"{verdict.points:g} / {verdict.most:g}", style))
        return table


def grade(entry: Entry, sources: Sequence[tuple[str, str]], nursery: Nursery | None = None) -> Result:
    """Grade one submission.

    Args:
        sources: (path, text) pairs that run one after the other as one module; usually one.
        nursery: where to run it; by default in one of its own.
    """
    if nursery is None:
        with Nursery() as nursery:
            return grade(entry, sources, nursery)
    start = time.monotonic()
    lesson = load_grader(entry)
    submission = Submission(nursery, entry.file("grade.py"), sources)
    try:
        verdicts = [judged(check, submission.run) for check in lesson.checks]
    finally:
        submission.close()
    return Result(entry, verdicts, submission.printed, time.monotonic() - start)


def judged(check: Check, run: Run) -> Verdict:
    """Return what a check says."""
    try:
        check.judge(run)
    except Wrong as verdict:
        points = min(max(verdict.points, 0.0), check.points)
        return Verdict(check.name, points, check.points, verdict.message)
    except Exception as error:  # the submission returned something that the check did not reckon with
        message = (
            "what was returned could not be judged; is it what the docstring promises? "
            f"({type(error).__name__}: {error})"
        )
        return Verdict(check.name, 0.0, check.points, message)
    return Verdict(check.name, check.points, check.points)
