"""Train one model on real ranks in four ways, and compare each with the serial run.

    mpirun -n 4 python lessons/04_data_parallel/experiment.py

All-reduce, a master, and parameters averaged every step and every eight: for each the time of a step, the bytes
a rank communicates, and how far its weights are from those of the serial run after the last step. A single rank
has nobody to share with; start it with mpirun to see more. More ranks than cores give right weights and no speed.
"""

import argparse
import statistics

import numpy as np
from rich.console import Console
from rich.table import Table

import minipar
from minipar import Tensor, optim
from minipar.comm.blas import one_blas_thread
from minipar.comm.launcher import available_cores
from minipar.data import Loader, load
from minipar.models import MLP, MLPConfig
from minipar.parallel import DataParallel, LocalSGD
from minipar.plot import COLOURS, new_figure

EVERY = 8  # steps between the averages of the last way


def build(width):
    return MLP(MLPConfig(inputs=64, classes=10, width=width, layers=3)).materialize(0, "float64")


def flat_weights(model):
    return np.concatenate([p.data.ravel() for p in model.parameters()])


def batches(data, options, comm=None):
    place = {} if comm is None else {"rank": comm.rank, "ranks": comm.size}
    return Loader(data, options.batch, dtype="float64", prefetch=0, **place).steps(options.steps)


def serial(data, options, clock):
    """Train without any communicator; return the weights and the seconds of each step."""
    model = build(options.width)
    update, seconds = optim.SGD(model.parameters(), lr=options.lr), []
    for batch in batches(data, options):
        start = clock()
        model.zero_grad()
        (model.loss(model(Tensor(batch.inputs)), batch.targets) / batch.count).backward()
        update.step()
        seconds.append(clock() - start)
    return flat_weights(model), seconds


def aggregated(comm, data, options, aggregation):
    """Train with gradients summed on all ranks, or at a master."""
    model = build(options.width)
    parallel = DataParallel(model, comm, aggregation=aggregation)
    update, seconds = optim.SGD(model.parameters(), lr=options.lr), []
    comm.ledger.reset()
    for batch in batches(data, options, comm):
        start = comm.now()
        model.zero_grad()
        (model.loss(parallel(Tensor(batch.inputs)), batch.targets) / batch.count).backward()
        parallel.step(update)
        seconds.append(comm.now() - start)
    return flat_weights(model), seconds


def averaged(comm, data, options, every):
    """Train with local steps and parameters averaged every so many."""
    model = build(options.width)
    wrapper, update, seconds = LocalSGD(model, comm, every), optim.SGD(model.parameters(), lr=options.lr), []
    comm.ledger.reset()
    for batch in batches(data, options, comm):
        start = comm.now()
        model.zero_grad()
        loss = model.loss(model(Tensor(batch.inputs)), batch.targets)
        (loss / max(batch.local_count, 1)).backward()
        wrapper.step(update, batch.local_count)
        seconds.append(comm.now() - start)
    return flat_weights(model), seconds


def draw(found, ranks, path):
    """Draw the time of a step and the distance from the serial weights, a bar each; save the picture."""
    figure = new_figure(9.0, 1.3 + 0.42 * len(found))
    left, right = figure.subplots(1, 2, sharey=True)
    for row, (colour, (seconds, _, apart)) in enumerate(zip(COLOURS, found.values())):
        left.barh(row, 1e3 * seconds, color=colour)
        right.barh(row, max(apart, 1e-17), color=colour)
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.set_xlabel("a step (ms)")
    right.set_xscale("log")
    right.set_xlim(1e-17, 10)
    right.set_xlabel("weights: relative difference from serial")
    figure.suptitle(f"{ranks} ranks")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="training steps (default 40)")
    parser.add_argument("--batch", type=int, default=62, help="samples in the global batch (default 62)")
    parser.add_argument("--width", type=int, default=128, help="width of the hidden layers (default 128)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of SGD (default 0.1)")
    parser.add_argument(
        "--out", default="04_data_parallel.png", help="picture (default 04_data_parallel.png)"
    )
    options = parser.parse_args()
    comm, data = minipar.world(), load("digits").train
    if comm.size == 1:
        print("a single rank: all ways are the serial one. For more: mpirun -n 4 python " + __file__)
    reference, seconds = serial(data, options, comm.now)
    found = {"serial, on one rank": (statistics.median(seconds), 0.0, 0.0)}
    for name, train in {
        "all-reduce": lambda: aggregated(comm, data, options, "all_reduce"),
        "master": lambda: aggregated(comm, data, options, "master"),
        "averaged every step": lambda: averaged(comm, data, options, 1),
        f"averaged every {EVERY}": lambda: averaged(comm, data, options, EVERY),
    }.items():
        weights, seconds = train()
        n_bytes = comm.ledger.bytes() / options.steps
        apart = float(np.abs(weights - reference).max() / np.abs(reference).max())
        slowest = comm.all_reduce(np.array([statistics.median(seconds), apart]), op="max")
        found[name] = (float(slowest[0]), n_bytes, float(slowest[1]))
    if comm.rank != 0:
        return
    table = Table(title=f"{options.steps} steps of SGD on {comm.size} ranks", title_justify="left")
    for heading in ("way", "ms a step", "KiB a step", "weights: off by"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, (took, n_bytes, apart) in found.items():
        table.add_row(name, f"{1e3 * took:.2f}", f"{n_bytes / 1024:,.1f}", f"{apart:.1e}")
    Console().print(table)
    if comm.size > available_cores():
        print(f"{comm.size} ranks share {available_cores()} cores: a step has the wait for a core in it")
    draw(found, comm.size, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    with one_blas_thread():  # one core a rank, for the serial run as well
        main()
