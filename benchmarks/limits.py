"""The limits of the machine itself: how fast one core multiplies and copies, and how far two scale.

Every other figure is to be read beside these. A virtual machine's two "cores" may be two threads of one, which
share its execution units: then no program of two ranks is anywhere near twice as fast as one.
"""

from __future__ import annotations

from machine import copy_rate, paired, sgemm_rate
from table import Line

NAMES = {"sgemm": "sgemm 1024³", "copy": "copy of 64 MiB"}


def found(quick: bool) -> dict[str, float]:
    """Return the limits: rates of one thread, and how many times these two processes at once reach."""
    repeats, seconds, rounds = (3, 0.1, 1) if quick else (15, 1.0, 3)
    rates = {"sgemm_gflops": sgemm_rate(repeats) / 1e9, "copy_gb_per_s": copy_rate(repeats) / 1e9}
    return rates | {f"two_{work}": paired(work, seconds, rounds) for work in NAMES}


def lines(limits: dict[str, float]) -> list[Line]:
    """Return a line for each limit."""
    one = [
        Line(f"{NAMES['sgemm']}, one thread", limits["sgemm_gflops"], "GFLOP/s"),
        Line(f"{NAMES['copy']}, one thread", limits["copy_gb_per_s"], "GB/s", note="bytes copied, not read + written"),
    ]
    note = "the most that two ranks can gain over one"
    return one + [
        Line(f"{name}, two processes over one", times, "×", 2.0, "two whole cores", times / 2, None, note)
        for name, times in ((name, limits[f"two_{work}"]) for work, name in NAMES.items())
    ]
