"""All-reduce on two ranks: minipar with checks off and on, in symmetric memory, and its own ring, beside raw mpi4py.

    python benchmarks/communication.py        # prints the table; starts its own two ranks
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from table import Line, show
from turns import HERE, ONE_THREAD

SIZES = {"1 KiB": 256, "1 MiB": 2**18, "16 MiB": 2**22}  # elements of float32
REPEATS = {"1 KiB": 200, "1 MiB": 20, "16 MiB": 1}  # calls a turn
TURNS = {"1 KiB": 100, "1 MiB": 100, "16 MiB": 500}  # a call of 16 MiB differs by 100 µs and more from turn to turn
LAUNCHES = 8  # where a process's memory lies makes a difference too
OVERHEAD = 2e-6  # seconds over raw mpi4py that a call may take, or 5 % if that is more
CHECKS = 10e-6  # seconds that checks may add
RING = 1.5  # times the library's time, at most


def measure(quick: bool) -> list[Line]:
    """Start two ranks, again and again, let them measure, and return the lines."""
    found: dict[str, dict[str, list[float]]] = {size: {} for size in SIZES}
    for _ in range(1 if quick else LAUNCHES):
        for size, turns in launched(quick).items():
            for way, times in turns.items():
                found[size].setdefault(way, []).extend(times)
    lines: list[Line] = []
    for size, turns in found.items():
        median = {name: statistics.median(times) for name, times in turns.items()}
        raw, off, on = (median[name] for name in ("raw", "off", "on"))
        allowed = max(OVERHEAD, 0.05 * raw)
        (wrapped, error_wrapped), (checked, error_checked) = more(turns, "off", "raw"), more(turns, "on", "off")
        name = f"all_reduce {size}"
        lines += [
            Line(
                f"{name}, checks off", off * 1e6, "µs", raw * 1e6, "raw mpi4py", (raw + allowed) / (raw + wrapped), 1.0,
                f"{wrapped * 1e6:+.1f} ± {error_wrapped * 1e6:.1f} µs, allowed {allowed * 1e6:.1f}",
            ),
            Line(
                f"{name}, checks on", on * 1e6, "µs", off * 1e6, "checks off", (off + CHECKS) / (off + checked), 1.0,
                f"{checked * 1e6:+.1f} ± {error_checked * 1e6:.1f} µs, allowed {CHECKS * 1e6:.0f}",
            ),
        ]  # fmt: skip
        if "symmetric" in median:
            symmetric, beside = median["symmetric"], median["raw, beside"]
            lines.append(
                Line(
                    f"{name}, symmetric memory", symmetric * 1e6, "µs", beside * 1e6, "raw mpi4py", beside / symmetric,
                    None, "checks off",
                )
            )  # fmt: skip
        wanted = 1 / RING if size == "16 MiB" else None
        ring, fresh = median["ring"], median["raw, fresh"]
        note = "both give a fresh array"
        lines.append(
            Line(f"{name}, own ring", ring * 1e6, "µs", fresh * 1e6, "raw mpi4py", fresh / ring, wanted, note)
        )
    return lines


def launched(quick: bool) -> dict[str, dict[str, list[float]]]:
    """Start two ranks and return what `on_two_ranks` returns there."""
    script = [str(HERE / "communication.py"), "--ranks", str(int(quick))]
    command = [sys.executable, "-m", "minipar", "run", "-n", "2", "--timeout", "300", *script]
    job = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, dict[str, list[float]]] = json.loads(job.stdout.splitlines()[-1])
    return found


def more(turns: dict[str, list[float]], way: str, than: str) -> tuple[float, float]:
    """Return the seconds a call that one way takes more than another, and their standard error.

    The median over turns of the difference within a turn, so that a machine which is slower for a while is slower
    for both. Its error by the spread of the medians of 200 draws of as many turns (bootstrap; Efron 1979).
    """
    differences = [a - b for a, b in zip(turns[way], turns[than])]
    draw = random.Random(0).choices
    medians = [statistics.median(draw(differences, k=len(differences))) for _ in range(200)]
    return statistics.median(differences), statistics.stdev(medians)


def interleaved(
    runs: dict[str, Callable[[], Any]], barrier: Callable[[], Any], rounds: int, each: int
) -> dict[str, list[float]]:
    """Return each function's seconds a call, turn by turn; a turn is `each` calls after a barrier.

    In an order that changes from turn to turn, the same on all ranks: who comes after whom finds another cache.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs.items()), random.Random(0).shuffle
    for turn in range(rounds + 1):
        shuffle(order)
        for name, run in order:
            barrier()
            start = time.perf_counter()
            for _ in range(each):
                run()
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - start) / each)
    return times


def on_two_ranks(quick: bool) -> dict[str, dict[str, list[float]]]:
    """Return seconds by size and way; every rank calls it."""
    from mpi4py import MPI

    import minipar
    from minipar.backend import keep_freed_memory
    from minipar.comm.collectives import ring_all_reduce
    from minipar.comm.symmetric import SMALLEST

    keep_freed_memory()
    comm = minipar.world(checks=True)
    checked = comm.split(0)
    comm = minipar.world(checks=False)
    free = comm.split(0)
    symmetric = comm.split(0)
    assert checked is not None and free is not None and symmetric is not None
    raw = MPI.COMM_WORLD.Dup()
    found = {}
    for size, n in SIZES.items():
        x = np.zeros(n, np.float32)
        in_place = {
            "raw": lambda x=x: raw.Allreduce(MPI.IN_PLACE, x, MPI.SUM),
            "off": lambda x=x: free.all_reduce_(x),
            "on": lambda x=x: checked.all_reduce_(x),
        }
        shared = symmetric.symmetric(n, np.float32)
        fresh = {
            "raw, fresh": lambda x=x: raw.Allreduce(x, np.empty_like(x), MPI.SUM),
            "ring": lambda x=x: ring_all_reduce(free, x),
        }
        shared_by_all = {
            "raw, beside": in_place["raw"],
            "symmetric": lambda x=shared: symmetric.all_reduce_(x),
        }
        found[size] = {
            **interleaved(in_place, raw.Barrier, 3 if quick else TURNS[size], REPEATS[size]),
            **interleaved(fresh, raw.Barrier, 3 if quick else 25, REPEATS[size]),
        }
        if x.nbytes >= SMALLEST:  # what is smaller lies in ordinary memory
            found[size] |= interleaved(shared_by_all, raw.Barrier, 3 if quick else 25, REPEATS[size])
    return found


if __name__ == "__main__":
    if "--ranks" in sys.argv:
        import minipar

        result = on_two_ranks(sys.argv[-1] == "1")
        if minipar.world().rank == 0:
            print(json.dumps(result), flush=True)
    else:
        print(show(measure(quick=False)))
