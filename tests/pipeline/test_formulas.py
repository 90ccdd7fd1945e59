"""Simulated bubbles and live activations equal the papers' formulas, exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest

from minipar.errors import UsageError
from minipar.parallel.pipeline.formulas import FORMULAS
from minipar.parallel.pipeline.schedules import SCHEDULES, build_schedule
from minipar.parallel.pipeline.simulator import simulate

PAIRS = [(p, m) for p in (1, 2, 3, 4, 5, 8, 16) for m in (1, 2, 3, 4, 7, 8, 16, 32)]  # 56


def cases() -> list[tuple[str, int, int, int]]:
    """Return (schedule, p, m, v) for every pair that meets the formula's condition."""
    found = [(n, p, m, 1) for n in ("naive", "gpipe", "1f1b") for p, m in PAIRS]
    found += [("zb-h1", p, m, 1) for p, m in PAIRS if m >= p]
    found += [("interleaved", p, m, v) for p, m in PAIRS if p > 1 and m % p == 0 for v in (2, 3)]
    return found


def test_every_schedule_has_thirty_pairs() -> None:
    for name in SCHEDULES:
        assert len([c for c in cases() if c[0] == name]) >= 30, name


@pytest.mark.parametrize("name", SCHEDULES)
def test_bubble_and_live_activations(name: str) -> None:
    for schedule, p, m, v in cases():
        if schedule != name:
            continue
        timeline = simulate(build_schedule(name, p, m, v if v > 1 else None))
        formula = FORMULAS[name]
        assert Fraction(timeline.bubble) == formula.bubble(p, m, v), (p, m, v)
        assert list(timeline.peak_live) == [formula.live(s, p, m, v) for s in range(p)], (p, m, v)


def test_the_formulas_are_the_papers() -> None:
    """The closed forms themselves, against numbers worked out by hand."""
    assert FORMULAS["gpipe"].bubble(4, 8, 1) == Fraction(3, 11)
    assert FORMULAS["1f1b"].bubble(4, 8, 1) == Fraction(3, 11)
    assert FORMULAS["interleaved"].bubble(4, 8, 2) == Fraction(3, 19)
    assert FORMULAS["zb-h1"].bubble(4, 8, 1) == Fraction(3, 27)
    assert [FORMULAS["1f1b"].live(s, 4, 8, 1) for s in range(4)] == [4, 3, 2, 1]
    assert [FORMULAS["interleaved"].live(s, 4, 8, 2) for s in range(4)] == [11, 9, 7, 5]


@pytest.mark.parametrize(
    "name, sizes, says",
    [
        ("interleaved", (4, 6, 2), "4 or 8"),
        ("nothing", (2, 2), "unknown"),
        ("gpipe", (0, 2), "at least 1"),
        ("1f1b", (2, 0), "at least 1"),
        ("1f1b", (2, 4, 2), "chunks"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name: str, sizes: tuple[int, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build_schedule(name, *sizes)
