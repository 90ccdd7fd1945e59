"""Measure on real ranks how much of the gradients' communication is hidden behind backward.

    mpirun -n 2 python lessons/05_buckets_and_overlap/experiment.py

Forward and backward of a GPT run in turns without any communication, with sums after backward, and with sums
during backward, for several bucket sizes. `alone` is what the same sums take by themselves; `exposed` is by how
much they make the step longer (below zero: less than the noise). Each is the least of its rounds, since other
programs only ever add to it. To hide something takes a core that is free to move messages: with as many ranks as
cores, expect little on one machine.
"""

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

import minipar
from minipar.comm.blas import one_blas_thread
from minipar.comm.launcher import available_cores
from minipar.models import GPT, GPTConfig
from minipar.parallel import DataParallel
from minipar.plot import COLOURS, new_figure

WAYS = (  # largest bucket in MiB, and whether sums are begun during backward
    ("one a parameter", 1e-6, False),
    ("one for all", 1e3, False),
    ("one a parameter", 1e-6, True),
    ("0.25 MiB", 0.25, True),
    ("1 MiB", 1.0, True),
)


class Way:
    """One model with its wrapper: what is timed.

    Attributes:
        seconds: the least time of forward and backward so far, of the slowest rank.
        alone: the least time of its sums alone.
    """

    def __init__(self, comm, options, bucket_mb, overlap, silent=False):
        config = GPTConfig(vocab=96, seq_len=64, width=options.width, layers=options.layers, heads=4)
        self.comm, self.silent, self.overlap = comm, silent, overlap
        self.model = GPT(config).materialize(0)
        self.parallel = DataParallel(self.model, comm, bucket_mb=bucket_mb, overlap=overlap)
        rng = np.random.default_rng(comm.rank)
        self.ids = rng.integers(0, 96, (options.batch, 64))
        self.seconds = self.alone = float("inf")

    def slowest(self, action):
        """Return how long an action took on the slowest rank."""
        self.comm.barrier()
        start = self.comm.now()
        action()
        return float(self.comm.all_reduce(np.array([self.comm.now() - start]), op="max")[0])

    def step(self):
        self.model.zero_grad()
        loss = self.model.loss(self.parallel(self.ids), self.ids) / (self.ids.size * self.comm.size)
        if self.silent:
            with self.parallel.no_sync():
                loss.backward()
        else:
            loss.backward()

    def sums(self):
        works = [self.comm.all_reduce_async_(bucket.flat) for bucket in self.parallel.buckets]
        for work in works:
            work.wait()

    def round(self):
        self.seconds = min(self.seconds, self.slowest(self.step))
        if not self.silent:
            self.alone = min(self.alone, self.slowest(self.sums))


def draw(ways, silent, path):
    """Draw each step as computation and exposed communication; save the picture."""
    figure = new_figure(8.0, 1.5 + 0.4 * len(ways))
    axes = figure.subplots()
    base = 1e3 * silent.seconds
    for row, (_, way) in enumerate(ways):
        exposed = max(1e3 * way.seconds - base, 0.0)
        axes.barh(row, base, color=COLOURS[0], label="forward and backward")
        axes.barh(row, exposed, left=base, color=COLOURS[1], label="exposed communication")
    axes.set_yticks(
        range(len(ways)), [f"{name}, {'during' if way.overlap else 'after'}" for name, way in ways]
    )
    axes.invert_yaxis()
    axes.set_xlabel("time (ms)")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[:2], names[:2], frameon=False, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=128, help="width of the GPT (default 128)")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the GPT (default 2)")
    parser.add_argument("--batch", type=int, default=2, help="samples a rank (default 2)")
    parser.add_argument("--rounds", type=int, default=20, help="most timings of each way (default 20)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="begin no round later than this (default 5)"
    )
    parser.add_argument("--out", default="05_buckets_and_overlap.png", help="picture (default 05_…png)")
    options = parser.parse_args()
    comm = minipar.world(checks=False)  # a check is a message too, and would be timed
    if comm.size == 1:
        print(
            "nothing is sent by a single rank: mpirun -n 2 python lessons/05_buckets_and_overlap/experiment.py"
        )
        sys.exit(2)
    silent = Way(comm, options, 1.0, False, silent=True)
    ways = [(name, Way(comm, options, bucket_mb, overlap)) for name, bucket_mb, overlap in WAYS]
    begin, rounds, going_on = comm.now(), 0, True
    while going_on:  # in turns, so that a busy moment meets all of them
        for way in (silent, *(way for _, way in ways)):
            way.round()
        rounds += 1
        elapsed = comm.broadcast(np.array([comm.now() - begin]))[0]  # one rank decides for all
        going_on = rounds < 2 or (rounds < options.rounds and elapsed < options.seconds)
    if comm.rank != 0:
        return
    n_bytes = sum(bucket.flat.nbytes for bucket in silent.parallel.buckets)
    title = f"{comm.size} ranks, {n_bytes / 2**20:.1f} MiB of gradients, {rounds} rounds"
    table = Table(title=title, title_justify="left")
    for heading in ("buckets", "begun", "sums", "step ms", "alone ms", "exposed ms", "hidden"):
        table.add_column(heading, justify="left" if heading in ("buckets", "begun") else "right")
    for name, way in ways:
        exposed = way.seconds - silent.seconds
        hidden = min(max(1 - exposed / way.alone, 0.0), 1.0)
        table.add_row(
            name, "during" if way.overlap else "after", str(len(way.parallel.buckets)), f"{1e3 * way.seconds:.1f}",
            f"{1e3 * way.alone:.1f}", f"{1e3 * exposed:.1f}", f"{100 * hidden:.0f} %",
        )  # fmt: skip
    Console().print(table)
    print(f"forward and backward without sums: {1e3 * silent.seconds:.1f} ms")
    if comm.size > available_cores():
        print(f"{comm.size} ranks share {available_cores()} cores: times have the wait for a core in them")
    draw(ways, silent, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    with one_blas_thread():  # two ranks of two BLAS threads on two cores are many times slower
        main()
