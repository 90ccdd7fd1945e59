"""A planted fault: one change to one file, and the tests that must turn red because of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Replace `old`, which occurs once in `file`, by `new`: then `tests` (arguments of pytest) fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
