"""What a learner has reached: the best points for each lesson, and the exercises under way.

Kept as JSON in the user's state directory ($XDG_STATE_HOME, else ~/.local/state), so that it outlives a fresh
clone and changes nothing in the repository.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipar.errors import DataError
from minipar.grading.manifest import Entry


@dataclass
class Reached:
    """The state of one lesson: the best points so far (None before the first grading), and its exercise."""

    points: float | None = None
    exercise: Path | None = None


def state_file() -> Path:
    """Return where progress is kept."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "minipar" / "lessons.json"


def _read() -> dict[str, Any]:
    path = state_file()
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        state = None
    if not isinstance(state, dict) or not all(isinstance(table, dict) for table in state.values()):
        raise DataError(f"{path} is not what minipar wrote there: delete it to begin anew")
    return state


def reached(entry: Entry) -> Reached:
    """Return the state of a lesson.

    Raises:
        DataError: the file cannot be read.
    """
    table = _read().get(entry.name, {})
    exercise = table.get("exercise")
    return Reached(table.get("points"), Path(exercise) if exercise else None)


def note(entry: Entry, points: float | None = None, exercise: Path | None = None) -> None:
    """Keep the points of a grading if they are the best so far, or where the exercise was copied to.

    Raises:
        OSError, DataError: the file cannot be written or read.
    """
    state, path = _read(), state_file()
    table = state.setdefault(entry.name, {})
    if points is not None:
        table["points"] = max(points, table.get("points") or 0)
    if exercise is not None:
        table["exercise"] = str(exercise)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(state, indent=1))
    temporary.replace(path)
