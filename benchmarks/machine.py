"""What the machine is, and the limits that arithmetic and memory set: matrix products and copies."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
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
    blas = [f"{x['internal_api']} {x['version']}" for x in threadpool_info() if x["user_api"] == "blas"]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "blas": sorted(set(blas)),
        "versions": versions,
        "commit": commit(),
        "load": list(os.getloadavg()),
    }


def cpu_name() -> str:
    """Return the processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


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


def sgemm_rate(size: int = 1024, repeats: int = 15) -> float:
    """Return floating-point operations a second of a (size, size) float32 matrix product on one thread."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    out = np.empty_like(a)
    with threadpool_limits(1, user_api="blas"):
        return 2 * size**3 / median_seconds(lambda: np.matmul(a, b, out=out), repeats)


def copy_rate(megabytes: int = 64, repeats: int = 9) -> float:
    """Return bytes copied a second, of an array too large for any cache."""
    a = np.ones(megabytes * 2**18, np.float32)
    b = np.empty_like(a)
    return a.nbytes / median_seconds(lambda: np.copyto(b, a), repeats)
