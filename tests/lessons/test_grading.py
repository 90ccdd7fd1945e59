"""Every lesson's grader: full points for the reference, none for the stub, and each wrong answer found out.

A wrong answer in `tests/wrong_answers/NN/` holds the wrong functions only. It runs on top of the reference, in
one module, must lose points, and the grader's messages must contain its MESSAGE. A right answer in
`tests/right_answers/NN/` runs in the same way, and keeps all points: the contract allows what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minipar.grading.manifest import Entry
from minipar.grading.result import Result, grade
from minipar.grading.sandbox import Nursery
from tests.lessons.lesson_files import (
    ENTRIES,
    QUICK,
    is_written,
    right_answers,
    solution,
    tag,
    written,
    wrong_answers,
)

FEWEST = 8  # wrong answers a lesson


def messages(result: Result) -> str:
    return "\n".join(verdict.message for verdict in result.verdicts)


@pytest.mark.parametrize("entry", written("grader", quick=(QUICK,)))
def test_reference_gets_full_points(entry: Entry, nursery: Nursery) -> None:
    result = grade(entry, [solution(entry)], nursery)
    assert result.passed and result.points == entry.points > 0, messages(result)


@pytest.mark.parametrize("entry", written("grader", quick=(QUICK,)))
def test_stub_gets_nothing_and_is_told_what_to_write(entry: Entry, nursery: Nursery) -> None:
    path = entry.file("exercise.py")
    result = grade(entry, [(str(path), path.read_text())], nursery)
    assert result.points == 0, [verdict for verdict in result.verdicts if verdict.points]
    assert all(len(verdict.message) > 20 for verdict in result.verdicts)
    assert "not written yet: " in messages(result)


@pytest.mark.parametrize("entry", written("wrong answers", quick=(QUICK,)))
def test_there_are_wrong_answers(entry: Entry) -> None:
    answers = wrong_answers(entry)
    assert len(answers) >= FEWEST
    assert all(len(what) > 10 and len(message) > 10 for what, message in map(tag, answers))


def answers(of: Callable[[Entry], list[Path]]) -> list:
    """Return the answers that `of` gives for each lesson, as parameters of a test."""
    return [
        pytest.param(entry, path, id=f"{entry.number:02}-{path.stem}", marks=marks)
        for entry in ENTRIES
        if is_written(entry)
        for marks in ([] if entry.number == QUICK else [pytest.mark.lessons],)
        for path in of(entry)
    ]


@pytest.mark.parametrize(("entry", "path"), answers(right_answers))
def test_right_answer_gets_full_points(entry: Entry, path: Path, nursery: Nursery) -> None:
    result = grade(entry, [solution(entry), (str(path), path.read_text())], nursery)
    assert result.passed, messages(result)


@pytest.mark.parametrize(("entry", "path"), answers(wrong_answers))
def test_wrong_answer_is_found_out(entry: Entry, path: Path, nursery: Nursery) -> None:
    result = grade(entry, [solution(entry), (str(path), path.read_text())], nursery)
    _, message = tag(path)
    assert result.points < entry.points, "it gets full points"
    assert message in messages(result), messages(result)
    assert "could not be judged" not in messages(result)
