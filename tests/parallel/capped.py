"""A minipar command under a memory cap, on one rank or many: `capped.py MEGABYTES train mlp --zero 3 …`.

The cap is on each process's private memory beyond what the interpreter, its libraries and MPI hold already.
"""

import resource
import sys

import numpy as np

import minipar.commands.job  # noqa: F401 (loaded before the cap)
from minipar import world
from minipar.cli import app
from minipar.data import load
from minipar.plot.figure import new_figure


def private_bytes() -> int:
    """What RLIMIT_DATA counts: heap and private writable mappings."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def main(megabytes: int, words: list[str]) -> None:
    new_figure()  # what the libraries allocate at their first use does not count
    if "--data" not in words:
        load("digits", "images")
    np.ones((1024, 1024), np.float32) @ np.ones((1024, 1024), np.float32)
    world().barrier()
    resource.setrlimit(resource.RLIMIT_DATA, (private_bytes() + megabytes * 2**20, -1))
    app(words)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
