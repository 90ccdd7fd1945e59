"""`minipar doctor`: is everything here that a parallel run needs? Each finding names its fix."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import threadpoolctl

MPI_SECONDS = 60  # to start MPI in a process of its own
PROGRAM = """
import numpy as np, minipar
world = minipar.world()
total = world.all_reduce(np.array([world.rank + 1.0]))
assert world.size == 2 and total[0] == 3.0, (world.size, total)
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what it is, what was found, whether it is well, and what to do if not."""

    subject: str
    found: str
    well: bool = True
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything and return the findings."""
    return [_python(), _numpy(), *_blas(), _mpi_library(), _launcher(), _two_ranks(), _cores(), _gpu()]


def _python() -> Finding:
    version = platform.python_version()
    well = sys.version_info >= (3, 11)
    return Finding(
        "Python", f"{version} on {platform.platform(terse=True)}", well, "install Python 3.11 or newer"
    )


def _numpy() -> Finding:
    return Finding("NumPy", np.__version__, int(np.__version__.split(".")[0]) >= 2, "pip install 'numpy>=2'")


def _blas() -> list[Finding]:
    libraries = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
    if not libraries:
        return [
            Finding("BLAS", "not recognised", False, "install NumPy from PyPI, whose wheels bring OpenBLAS")
        ]
    cores = os.cpu_count() or 1
    return [
        Finding(
            "BLAS",
            f"{lib['internal_api']} {lib['version']}, {lib.get('architecture', 'unnamed')} kernels,"
            f" {lib['num_threads']} of {cores} threads here, 1 a rank",
        )
        for lib in libraries
    ]


def _mpi_library() -> Finding:
    """In a process of its own: to ask starts MPI, and MPI can be started once only."""
    code = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
    fix = "pip install mpi4py mpich"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=MPI_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("MPI library", f"does not start within {MPI_SECONDS} s", False, fix)
    if done.returncode == 0:
        return Finding("MPI library", done.stdout.strip())
    said = done.stderr.strip().splitlines() or [f"ends without a word, exit code {done.returncode}"]
    return Finding("MPI library", said[-1][:100], False, fix)


def _launcher() -> Finding:
    from minipar.comm.launcher import find_mpirun

    try:
        return Finding("MPI launcher", str(find_mpirun()))
    except Exception as error:
        return Finding("MPI launcher", str(error), False, "pip install mpich")


def _two_ranks() -> Finding:
    from minipar.comm.launcher import run_mpi

    try:
        code = run_mpi([sys.executable, "-c", PROGRAM], ranks=2, timeout=60)
    except Exception as error:
        return Finding("2-rank all-reduce", str(error), False, "see the launcher above")
    fix = "library and launcher differ: pip install --force-reinstall mpich mpi4py in a fresh environment"
    return Finding(
        "2-rank all-reduce", "1 + 2 = 3 on both" if code == 0 else f"exit code {code}", code == 0, fix
    )


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", f"{cores}; more ranks than that share cores: right results, no speed-up")


def _gpu() -> Finding:
    try:
        import cupy
    except ImportError:
        return Finding("GPU", "no CuPy, so arrays live on the CPU; with a GPU: pip install 'minipar[cuda12]'")
    if not cupy.is_available():
        return Finding(
            "GPU", f"CuPy {cupy.__version__} finds no GPU", False, "check nvidia-smi and the CUDA version"
        )
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return Finding("GPU", f"{name}, CuPy {cupy.__version__}")
