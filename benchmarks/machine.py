"""What the machine is, and the limits that arithmetic and memory set: matrix products and copies.

    python benchmarks/machine.py sgemm 1.0     # what `paired` starts: the rate of one process, told to begin
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

PACKAGES = ("minipar", "numpy", "scipy", "mpi4py", "mpich", "torch", "autograd", "cupy-cuda12x", "cupy-cuda13x")


def facts() -> dict[str, Any]:
    """Return date, processor, BLAS and versions: what a figure is worth nothing without."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    blas = [
        " ".join(filter(None, (x["internal_api"], x["version"], x.get("architecture"))))  # that of its kernels
        for x in threadpool_info()
        if x["user_api"] == "blas"
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "blas": sorted(set(blas)),
        "versions": versions,
        "commit": commit(),
        "load": list(os.getloadavg()),
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name where the system tells it, with family and model: some hosts cut the name short."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in reversed(list(pairs))}  # of the first core
    numbers = [f"{word} {found[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in found]
    return " ".join([found.get("model name", platform.machine()), *numbers])


def stamp(about: dict[str, Any]) -> str:
    """Return the date and hour of `facts` as a file's name has them: 2026-11-27-0436."""
    day, hour, _ = about["date"].split()
    return f"{day}-{hour.replace(':', '')}"


def commit() -> str:
    """Return the commit that is checked out, with a + if files were changed since; empty outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        job = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        return job.stdout.strip() if job.returncode == 0 else ""

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def median_seconds(run: Any, repeats: int = 15) -> float:
    """Return the median time of `run()`, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def products(size: int = 1024) -> tuple[Callable[[], Any], float]:
    """Return a float32 matrix product of (size, size), and its floating-point operations."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out), 2.0 * size**3


def copies(megabytes: int = 64) -> tuple[Callable[[], Any], float]:
    """Return a copy of an array too large for any cache, and its bytes."""
    a = np.ones(megabytes * 2**18, np.float32)
    b = np.empty_like(a)
    return lambda: np.copyto(b, a), float(a.nbytes)


WORK = {"sgemm": products, "copy": copies}


def sgemm_rate(repeats: int = 15) -> float:
    """Return floating-point operations a second of `products` on one thread."""
    run, amount = products()
    with threadpool_limits(1, user_api="blas"):
        return amount / median_seconds(run, repeats)


def copy_rate(repeats: int = 9) -> float:
    """Return bytes copied a second."""
    run, amount = copies()
    return amount / median_seconds(run, repeats)


# Two processes at once --------------------------------------------------------------------------------


def paired(work: str, seconds: float = 1.0, rounds: int = 3) -> float:
    """Return how many times the rate of one process two reach that work at the same time, one thread each.

    2 on two whole cores; less where they share execution units, caches, a power budget or the path to memory,
    or where other programs want them as well. No two ranks scale better than this. Medians of turns.
    """
    alone, both = [], []
    for _ in range(rounds):
        alone += rates(work, seconds, 1)
        both.append(sum(rates(work, seconds, 2)))
    return statistics.median(both) / statistics.median(alone)


def rates(work: str, seconds: float, processes: int) -> list[float]:
    """Return the rate of each of some processes that work for the same `seconds`."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command, pipe = [sys.executable, __file__, work, str(seconds)], subprocess.PIPE
    jobs = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | one) for _ in range(processes)
    ]
    for job in jobs:
        assert job.stdout is not None
        if job.stdout.readline() != "ready\n":
            raise RuntimeError(f"{' '.join(command)} ended early (exit code {job.wait()})")
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("go\n")
        job.stdin.flush()
    return [float(job.communicate()[0]) for job in jobs]


def serve(work: str, seconds: float) -> None:
    """Get ready, wait for a word, work for `seconds`, and print the rate."""
    run, amount = WORK[work]()
    run()
    print("ready", flush=True)
    sys.stdin.readline()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        run()
        done += 1
    print(done * amount / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
