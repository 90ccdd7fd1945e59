"""The files of lessons that tests go over: read from the manifest, so that none is forgotten."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from minipar.grading.manifest import Entry, read_manifest

ROOT = Path(__file__).parents[2]
LESSONS = ROOT / "lessons"
SOLUTIONS = ROOT / "tests" / "solutions"
WRONG_ANSWERS = ROOT / "tests" / "wrong_answers"
RIGHT_ANSWERS = ROOT / "tests" / "right_answers"
QUICK = 1  # the lesson that plain `make test` grades, too

ENTRIES = read_manifest(LESSONS)


def is_written(entry: Entry) -> bool:
    """Whether the lesson's folder is there."""
    return entry.folder.is_dir()


def written(name: str, quick: tuple[int, ...] = ()) -> list:
    """Return every lesson as a parameter of a test; lessons not written yet are skipped, by name.

    Args:
        name: of the test's subject, for the reason of a skip.
        quick: lessons that plain `make test` goes over as well.
    """
    parameters = []
    for entry in ENTRIES:
        marks = [] if entry.number in quick else [pytest.mark.lessons]
        if not is_written(entry):
            marks.append(pytest.mark.skip(reason=f"lesson {entry.name} is not written yet: no {name}"))
        parameters.append(pytest.param(entry, id=entry.name, marks=marks))
    return parameters


def wrong_answers(entry: Entry) -> list[Path]:
    """Return the wrong answers of a lesson."""
    return sorted((WRONG_ANSWERS / f"{entry.number:02}").glob("*.py"))


def right_answers(entry: Entry) -> list[Path]:
    """Return the right answers of a lesson that are written in another way than its reference solution."""
    return sorted((RIGHT_ANSWERS / f"{entry.number:02}").glob("*.py"))


def solution(entry: Entry) -> tuple[str, str]:
    """Return path and text of a lesson's reference solution."""
    path = SOLUTIONS / f"{entry.name}.py"
    return str(path), path.read_text()


def tag(path: Path) -> tuple[str, str]:
    """Return a wrong answer's first docstring line and its MESSAGE."""
    tree = ast.parse(path.read_text())
    message = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MESSAGE"
    )
    return (ast.get_docstring(tree) or "").partition("\n")[0], message
