"""The list of lessons: `lessons/lessons.toml`, read by everything that needs numbers, titles or points."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import minipar
from minipar.errors import DataError, UsageError
from minipar.grading.lesson import Lesson

KEYS = ("number", "name", "title", "question", "prerequisites", "points")


@dataclass(frozen=True)
class Entry:
    """One lesson.

    Attributes:
        folder: where its walkthrough, experiment, exercise and grader are.
        name: the folder's name, "04_data_parallel".
        question: what a learner can answer afterwards, in a line.
        prerequisites: numbers of the lessons it builds on.
        points: of all its checks together.
    """

    folder: Path
    number: int
    name: str
    title: str
    question: str
    prerequisites: tuple[int, ...]
    points: float

    def file(self, name: str) -> Path:
        """Return the path of one of the lesson's files.

        Raises:
            UsageError: this copy of the lessons does not have it.
        """
        path = self.folder / name
        if not path.is_file():
            raise UsageError(f"lesson {self.number:02} has no {name} here: {path} does not exist")
        return path


def find_lessons() -> Path:
    """Return the folder of the lessons: in the repository that minipar runs from, else upwards from here.

    Raises:
        UsageError: neither has one.
    """
    here = Path.cwd()
    for root in (Path(minipar.__file__).parents[1], here, *here.parents):
        if (root / "lessons" / "lessons.toml").is_file():
            return root / "lessons"
    raise UsageError(
        "the lessons were not found: they come with the repository, so clone it and run this inside it, "
        "or install minipar from there with pip install -e"
    )


def read_manifest(lessons: Path | None = None) -> list[Entry]:
    """Return every lesson, in order.

    Args:
        lessons: the folder of the lessons, by default as `find_lessons` finds it.

    Raises:
        DataError: lessons.toml is malformed; the message names the lesson and the key.
    """
    folder = (lessons or find_lessons()).resolve()
    path = folder / "lessons.toml"
    try:
        tables = tomllib.loads(path.read_text()).get("lesson", [])
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: {error}") from None
    entries = []
    for number, table in enumerate(tables, 1):
        if sorted(table) != sorted(KEYS):
            missing, unknown = set(KEYS) - set(table), set(table) - set(KEYS)
            what = ", ".join(
                [f"without {key}" for key in missing] + [f"unknown key {key}" for key in unknown]
            )
            raise DataError(f"{path}: lesson {number}: {what}")
        if table["number"] != number or not table["name"].startswith(f"{number:02}_"):
            raise DataError(f"{path}: lesson {number} is listed as {table['number']}, {table['name']!r}")
        if not all(0 < before < number for before in table["prerequisites"]):
            raise DataError(f"{path}: lesson {number} can only build on earlier lessons")
        prerequisites = tuple(table.pop("prerequisites"))
        entries.append(Entry(folder / table["name"], prerequisites=prerequisites, **table))
    return entries


def find_entry(text: str, entries: list[Entry] | None = None) -> Entry:
    """Return the lesson that a user means by "4", "04" or "04_data_parallel".

    Raises:
        UsageError: there is no such lesson; the message lists them.
    """
    entries = read_manifest() if entries is None else entries
    for entry in entries:
        if text == entry.name or (text.isdecimal() and int(text) == entry.number):
            return entry
    known = ", ".join(entry.name for entry in entries)
    raise UsageError(f"there is no lesson {text!r}; the lessons are {known}")


def import_file(path: Path, name: str) -> ModuleType:
    """Return the module that a file makes, under the name `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def import_grader(path: Path) -> Lesson:
    """Return the `lesson` that a `grade.py` defines."""
    module: Any = import_file(path, f"grade_{path.parent.name}")
    lesson = getattr(module, "lesson", None)
    if not isinstance(lesson, Lesson):
        raise DataError(f"{path} must define `lesson = Lesson(number)`")
    return lesson


def load_grader(entry: Entry) -> Lesson:
    """Return the checks of a lesson.

    Raises:
        DataError: its number or points are not what the manifest says.
    """
    path = entry.file("grade.py")
    lesson = import_grader(path)
    if (lesson.number, lesson.points) != (entry.number, entry.points):
        raise DataError(
            f"{path}: lesson {lesson.number} with {lesson.points:g} points in all, but lessons.toml says "
            f"lesson {entry.number} with {entry.points:g}"
        )
    return lesson
