"""Measure what a message costs between real ranks: α and β, and three ways to pass an array around a ring.

    mpirun -n 2 python lessons/02_messages/experiment.py
    mpirun -n 4 python lessons/02_messages/experiment.py

Ranks 0 and 1 send arrays of growing length there and back; half of that time is one message, and a line
α + β n is fitted through them. Then all ranks pass an array to their right neighbour in three ways that differ
only in the order of sends and receives. The picture shows the messages and the fitted line.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import minipar
from minipar.comm.launcher import available_cores
from minipar.plot import COLOURS, new_figure

SIZES = tuple(8 * 4**k for k in range(10))  # bytes: 8 B to 2 MiB
RING_BYTES = 256 * 1024


def there_and_back(comm, x):
    """Send `x` from rank 0 to rank 1 and back."""
    if comm.rank == 0:
        comm.send(x, 1)
        comm.recv(1)
    elif comm.rank == 1:
        comm.send(comm.recv(0), 0)


def one_after_the_other(comm, x):
    """Pass `x` to the right: rank 0 begins, every other rank receives first. Returns what came."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.rank == 0:
        comm.send(x, right)
        return comm.recv(left)
    received = comm.recv(left)
    comm.send(x, right)
    return received


def odd_and_even(comm, x):
    """Pass `x` to the right: even ranks send first, odd ranks receive first. Returns what came."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.rank % 2 == 0:
        comm.send(x, right)
        return comm.recv(left)
    received = comm.recv(left)
    comm.send(x, right)
    return received


def all_at_once(comm, x):
    """Pass `x` to the right: every rank begins to send, then receives. Returns what came."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sending = comm.isend(x, right)
    received = comm.recv(left)
    sending.wait()
    return received


RINGS = {
    "one after the other": one_after_the_other,
    "odd and even": odd_and_even,
    "all at once": all_at_once,
}


def seconds_of(comm, action, repeats):
    """Return the time of the slowest rank, the least of all repeats: other programs only ever add to it."""
    times = []
    for _ in range(repeats + 1):
        comm.barrier()
        start = comm.now()
        action()
        times.append(float(comm.all_reduce(np.array([comm.now() - start]), op="max")[0]))
    return min(times[1:])  # the first one warms up


def fit(sizes, seconds):
    """Return α and β of the line through the measurements; each counts by its relative error."""
    sizes, seconds = np.array(sizes, dtype=float), np.array(seconds)
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    alpha, beta = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)[0]
    return max(float(alpha), 1e-9), max(float(beta), 1e-15)  # noise may tilt the line below zero


def measure(comm, repeats):
    """Return everything that is measured, the same on all ranks."""
    messages = []
    for n_bytes in SIZES:
        x = np.zeros(n_bytes, np.uint8)
        messages.append(seconds_of(comm, lambda x=x: there_and_back(comm, x), repeats) / 2)
    alpha, beta = fit(SIZES, messages)
    x = np.zeros(RING_BYTES, np.uint8)
    rings = {name: seconds_of(comm, lambda f=f: f(comm, x), repeats) for name, f in RINGS.items()}
    return {
        "ranks": comm.size,
        "sizes": SIZES,
        "messages": messages,
        "alpha": alpha,
        "beta": beta,
        "rings": rings,
    }


def draw(found, path):
    """Draw the messages' times over their lengths with the fitted line; save the picture."""
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    sizes = np.logspace(np.log10(SIZES[0]), np.log10(SIZES[-1]), 60)
    axes.loglog(SIZES, [1e6 * t for t in found["messages"]], "o", color=COLOURS[0], label="measured")
    axes.loglog(sizes, 1e6 * (found["alpha"] + found["beta"] * sizes), color=COLOURS[1], label="α + β n")
    axes.set_xlabel("message (bytes)")
    axes.set_ylabel("time (µs)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20, help="timings of each (default 20)")
    parser.add_argument("--out", default="02_messages.png", help="picture (default 02_messages.png)")
    parser.add_argument("--data", type=Path, help="write the measured numbers here, as JSON")
    options = parser.parse_args()
    comm = minipar.world(checks=False)  # a check is a message too, and would be timed
    if comm.size == 1:
        print("a message needs two ranks: mpirun -n 2 python lessons/02_messages/experiment.py")
        sys.exit(2)
    found = measure(comm, options.repeats)
    if comm.rank != 0:
        return
    table = Table(title="one message between ranks 0 and 1", title_justify="left")
    for heading in ("bytes", "measured (µs)", "α + β n (µs)"):
        table.add_column(heading, justify="right")
    for n_bytes, seconds in zip(SIZES, found["messages"]):
        model = found["alpha"] + found["beta"] * n_bytes
        table.add_row(f"{n_bytes:,}", f"{1e6 * seconds:,.1f}", f"{1e6 * model:,.1f}")
    Console().print(table)
    alpha, beta = found["alpha"], found["beta"]
    print(
        f"α = {1e6 * alpha:.1f} µs, β = {1e9 * beta:.3f} ns a byte; they weigh the same at {alpha / beta:,.0f} bytes"
    )
    title = f"{RING_BYTES // 1024} KiB to the right, {comm.size} ranks"
    table = Table(title=title, title_justify="left")
    table.add_column("order")
    table.add_column("measured (µs)", justify="right")
    for name, seconds in found["rings"].items():
        table.add_row(name, f"{1e6 * seconds:,.0f}")
    Console().print(table)
    if comm.size > available_cores():
        print(f"{comm.size} ranks share {available_cores()} cores: the wait for a core is in these times")
    draw(found, options.out)
    print(f"picture: {options.out}")
    if options.data is not None:
        options.data.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
