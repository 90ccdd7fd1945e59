"""What a lesson's `grade.py` is written with: a lesson, its checks and probes, and the words for a verdict.

    lesson = Lesson(4)

    @lesson.probe                                  # runs beside the submission; returns plain values
    def sums(submission, x):
        return minipar.launch(lambda: submission.all_reduce(minipar.world(), x), ranks=3)

    @lesson.check("every rank gets the sum", points=2)      # runs in the grader; judges what came back
    def check_sums(run: Run):
        x = np.random.default_rng(7).normal(size=5)
        got = run(sums, x)
        if close(got, [3 * x] * 3): return
        if close(got, [x] * 3): wrong("each rank has its own values still: was the reduced array returned?")
        wrong("rank 0 should hold 3 x and does not: …")

A check that returns gives its points. `wrong` ends it with a message and, for partial credit, some points.
A probe that raises, hangs, exits or eats memory ends the check too, with a message that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np

P = TypeVar("P", bound=Callable[..., Any])


class Wrong(Exception):
    """The verdict of a check that was not passed: a message and the points that remain."""

    def __init__(self, message: str, points: float = 0) -> None:
        super().__init__(message)
        self.message = message
        self.points = points


def wrong(message: str, points: float = 0) -> NoReturn:
    """End the check: not passed, for the reason that `message` gives, with `points` of partial credit."""
    raise Wrong(message, points)


class Run(Protocol):
    """What a check gets: calls a probe beside the submission and returns what it returned."""

    def __call__(self, probe: Callable[..., Any], *args: Any, seconds: float = 10.0, **kwargs: Any) -> Any:
        """Call `probe(submission, *args, **kwargs)` in the submission's process, for at most `seconds`.

        Raises:
            Wrong: the submission raised, hung, exited, printed without end or ate memory.
        """


@dataclass(frozen=True)
class Check:
    """One line of the table of points."""

    name: str
    points: float
    judge: Callable[[Run], None]


class Lesson:
    """The checks of one lesson, in order, and the probes that they use.

    Attributes:
        number: as in `lessons.toml`, whose title and points hold.
        forbidden: full names, "minipar.parallel", that its exercise asks to do without. A submission that imports
            one, or something in it, is told so and gets no points.
        checks: filled by `@lesson.check`.
        probes: by name, filled by `@lesson.probe`.
    """

    def __init__(self, number: int, forbidden: Sequence[str] = ()) -> None:
        self.number = number
        self.forbidden = tuple(forbidden)
        self.checks: list[Check] = []
        self.probes: dict[str, Callable[..., Any]] = {}

    @property
    def points(self) -> float:
        """The points of all checks together."""
        return sum(check.points for check in self.checks)

    def probe(self, function: P) -> P:
        """Make `function(submission, …)` a probe: what `run` can call in the submission's process."""
        if function.__name__ in self.probes:
            raise ValueError(f"lesson {self.number} has two probes named {function.__name__}")
        self.probes[function.__name__] = function
        return function

    def check(self, name: str, points: float) -> Callable[[P], P]:
        """Make a function of a `Run` a check with so many points; `name` says what is right if it passes."""
        if any(check.name == name for check in self.checks):
            raise ValueError(f"lesson {self.number} has two checks named {name!r}")

        def register(judge: P) -> P:
            self.checks.append(Check(name, points, judge))
            return judge

        return register


def close(a: Any, b: Any, tol: float = 1e-8) -> bool:
    """Return whether `a` equals `b`, arrays up to rounding: max|a-b| <= tol * max(max|b|, 1e-3).

    Goes into lists, tuples and dicts. Other shapes, lengths, keys or kinds are not close, nor is None to
    anything but None; a list of numbers may stand for an array of them. Infinities and NaNs are close to
    themselves.
    """
    if isinstance(b, dict) or isinstance(a, dict):
        same = isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys()
        return same and all(close(a[key], b[key], tol) for key in b)
    if a is None or b is None or isinstance(a, str) or isinstance(b, str):
        return type(a) is type(b) and a == b
    lists = isinstance(a, list | tuple), isinstance(b, list | tuple)
    if all(lists):
        return len(a) == len(b) and all(close(x, y, tol) for x, y in zip(a, b))
    try:
        x, y = np.asarray(a), np.asarray(b)
    except ValueError:  # a list of unequal lengths
        return False
    if x.shape != y.shape or x.dtype.kind not in "biufcV" or y.dtype.kind not in "biufcV":
        return False
    kind = np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64
    x, y = x.astype(kind), y.astype(kind)
    with np.errstate(invalid="ignore", over="ignore"):
        equal = (x == y) | (np.isnan(x) & np.isnan(y))
        finite = np.abs(y[np.isfinite(y)])
        allowed = tol * max(finite.max(initial=0.0), 1e-3)
        return bool(np.all(equal | (np.abs(x - y) <= allowed)))


def shaped(value: Any, shape: Sequence[int], dtype: Any = None, name: str = "the result") -> np.ndarray:
    """Return `value` if it is an array (or number) of this shape and dtype (None: any), else the check ends.

    Raises:
        Wrong: names what was returned, and the shape and dtype that were expected.
    """
    form = f"shape {tuple(shape)}" + (f" and dtype {np.dtype(dtype)}" if dtype is not None else "")
    expected = f"an array of {form} was expected"
    if value is None:
        wrong(f"{name} is None; {expected}: was `return` forgotten?")
    if not isinstance(value, np.ndarray | np.generic | int | float):
        wrong(f"{name} is a {type(value).__name__}; {expected}")
    array = np.asarray(value)
    if array.shape != tuple(shape):
        wrong(f"{name} has shape {array.shape}; {expected}")
    if dtype is not None and array.dtype != np.dtype(dtype):
        wrong(f"{name} has dtype {array.dtype}; {expected}")
    return array
