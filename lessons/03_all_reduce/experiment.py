"""Measure all-reduce on real ranks: four algorithms and the MPI library's own, against the α–β model.

    mpirun -n 4 python lessons/03_all_reduce/experiment.py

First α and β are read off two messages between ranks 0 and 1, a short one and a long one. Then every algorithm is
timed on several lengths; the table has the least of the repeats in µs, and under it what the model predicts. The
picture has the same.
More ranks than cores give right results, but times of ranks that wait for a core.
"""

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

import minipar
from minipar.comm.collectives import ALGORITHMS, cost
from minipar.comm.launcher import available_cores
from minipar.plot import COLOURS, new_figure

SIZES = (8, 4 * 1024, 64 * 1024, 1024**2)  # bytes


def seconds_of(comm, action, repeats):
    """Return the time of the slowest rank, the least of all repeats: other programs only ever add to it."""
    times = []
    for _ in range(repeats + 1):
        comm.barrier()
        start = comm.now()
        action()
        mine = np.array([comm.now() - start])
        times.append(float(comm.all_reduce(mine, op="max")[0]))
    return min(times[1:])  # the first one warms up


def message_seconds(comm, n_bytes, repeats):
    """Return the time of one message between ranks 0 and 1: half of there and back."""
    x = np.zeros(n_bytes // 8)

    def there_and_back():
        if comm.rank == 0:
            comm.send(x, 1)
            comm.recv_(x, 1)
        elif comm.rank == 1:
            comm.recv_(x, 0)
            comm.send(x, 0)

    return seconds_of(comm, there_and_back, repeats) / 2


def alpha_and_beta(comm, repeats):
    """Return α, the time of the shortest message, and β, what each byte of the longest one takes beyond it."""
    shortest, longest = (message_seconds(comm, n_bytes, repeats) for n_bytes in (SIZES[0], SIZES[-1]))
    return shortest, max(longest - shortest, 1e-12) / SIZES[-1]


def draw(found, ranks, alpha, beta, path):
    """Draw measured times (dots) and the model (lines) over the size of the array; save the picture."""
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    sizes = np.logspace(np.log10(SIZES[0]), np.log10(SIZES[-1]), 50)
    for colour, marker, (name, times) in zip(COLOURS, "os^Dx", found.items()):
        axes.loglog(SIZES, [1e6 * t for t in times], marker, color=colour, label=name)
        if name in ALGORITHMS:
            axes.loglog(
                sizes, [1e6 * cost(name, n, ranks, alpha, beta) for n in sizes], color=colour, alpha=0.6
            )
    axes.set_xlabel("array (bytes)")
    axes.set_ylabel("all-reduce (µs)")
    axes.set_title(f"{ranks} ranks: measured (marks), α–β model (lines)", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="timings of each (default 9)")
    parser.add_argument("--out", default="03_all_reduce.png", help="picture (default 03_all_reduce.png)")
    options = parser.parse_args()
    comm = minipar.world(checks=False)  # a check is a message too, and would be timed
    if comm.size == 1:
        print(
            "an all-reduce needs at least two ranks: mpirun -n 4 python lessons/03_all_reduce/experiment.py"
        )
        sys.exit(2)
    alpha, beta = alpha_and_beta(comm, options.repeats)
    algorithms = {**ALGORITHMS, "MPI library": lambda comm, x: comm.all_reduce(x)}
    found = {}
    for name, algorithm in algorithms.items():
        found[name] = []
        for n_bytes in SIZES:
            x = np.full(n_bytes // 8, float(comm.rank))
            total = algorithm(comm, x)
            assert (total == comm.size * (comm.size - 1) / 2).all()
            found[name].append(seconds_of(comm, lambda a=algorithm, x=x: a(comm, x), options.repeats))
    if comm.rank != 0:
        return
    table = Table(title=f"all-reduce on {comm.size} ranks (µs)", title_justify="left")
    table.add_column("algorithm")
    for n_bytes in SIZES:
        table.add_column(f"{n_bytes:,} B", justify="right")
    for name, times in found.items():
        table.add_row(name, *(f"{1e6 * t:,.0f}" for t in times))
        if name in ALGORITHMS:
            model = [cost(name, n_bytes, comm.size, alpha, beta) for n_bytes in SIZES]
            table.add_row("  model", *(f"{1e6 * t:,.0f}" for t in model), style="dim")
    Console().print(table)
    print(f"one message: α = {1e6 * alpha:.1f} µs, β = {1e9 * beta:.3f} ns a byte ({1e-9 / beta:.2f} GB/s)")
    if comm.size > available_cores():
        print(f"{comm.size} ranks share {available_cores()} cores: α has the wait for a core in it")
    draw(found, comm.size, alpha, beta, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
