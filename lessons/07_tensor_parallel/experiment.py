"""Tensor parallelism on real ranks: what every way to cut holds, sends and takes.

    mpirun -n 4 python lessons/07_tensor_parallel/experiment.py

All ranks work on the same samples. A GPT is cut by heads, features and vocabulary, with and without sequence
parallelism; a ConvNet by output channels, input channels and image regions. Each is compared with the serial
model. On a single rank there is nothing to cut, and only the serial models are measured.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import minipar
from minipar import Tensor
from minipar.comm import Communicator
from minipar.models import GPT, ConvNet, ConvNetConfig, GPTConfig, Model
from minipar.parallel.memory import held
from minipar.parallel.tensor_parallel import parallelize
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.plot import COLOURS, new_figure

HEADS = 12  # 1, 2, 3, 4, 6 and 12 ranks divide them
CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT, tensor": ("gpt", {}),
    "GPT, + sequence": ("gpt", {"sequence_parallel": True}),
    "ConvNet, output": ("convnet", {"convolution": "output"}),
    "ConvNet, input": ("convnet", {"convolution": "input"}),
    "ConvNet, region": ("convnet", {"convolution": "region"}),
}


@dataclass
class Found:
    """Of one step: the loss, bytes held, collectives and ring elements sent (both directions), seconds."""

    loss: float
    weights: int
    activations: int
    calls: int
    sent: float
    seconds: float


def build(kind: str, options: argparse.Namespace) -> tuple[Model, Any, np.ndarray]:
    """Return a model without values, a batch of inputs, and targets; the same on every rank."""
    rng = np.random.default_rng(0)
    if kind == "gpt":
        config = GPTConfig(vocab=96, seq_len=64, width=options.width, layers=2, heads=HEADS)
        ids = rng.integers(0, config.vocab, (options.batch, config.seq_len + 1))
        return GPT(config), ids[:, :-1], ids[:, 1:]
    images = rng.standard_normal((options.batch, 3, 32, 32)).astype("float32")
    net = ConvNet(ConvNetConfig(channels=3, size=32, classes=10, width=24, layers=2, groups=12))
    return net, Tensor(images), rng.integers(0, 10, options.batch)


def measure(comm: Communicator, kind: str, cut: dict[str, Any] | None, options: argparse.Namespace) -> Found:
    """Run forward and backward `options.steps` times, cut over `comm` or (None) serial on this rank."""
    model, inputs, targets = build(kind, options)
    if cut is not None:
        parallelize(model, comm, default_plan(model, **cut))
    model.materialize(seed=0)
    loss = model.loss(model(inputs), targets) / targets.size  # also warms up
    now = held(model, output=loss)
    times = []
    for step in range(options.steps):
        comm.mark(step=step)
        model.zero_grad()
        comm.ledger.reset()
        begin = comm.now()
        loss = model.loss(model(inputs), targets) / targets.size
        loss.backward()
        times.append(comm.now() - begin)
    total, seconds = comm.ledger.total(), statistics.median(times)
    return Found(
        loss.item(), now.parameters, now.activations, total.calls, float(total.ring_elements), seconds
    )


def serial(comm: Communicator, kind: str, options: argparse.Namespace) -> Found:
    """Measure the serial model on rank 0 while the others wait; the same on every rank."""
    found = measure(comm, kind, None, options) if comm.rank == 0 else None
    result: Found = comm.broadcast_object(found)
    return result


def picture(rows: dict[str, Found], path: Path, ranks: int) -> None:
    """Draw bytes held (weights, activations) and elements sent, a row a cut."""
    figure = new_figure(9.0, 3.6)
    memory, traffic = figure.subplots(1, 2, sharey=True)
    names, at = list(rows), range(len(rows))
    weights = np.array([f.weights for f in rows.values()]) / 1e6
    activations = np.array([f.activations for f in rows.values()]) / 1e6
    memory.barh(at, weights, color=COLOURS[0], edgecolor="white", label="weights")
    memory.barh(at, activations, left=weights, color=COLOURS[4], edgecolor="white", label="activations")
    traffic.barh(at, [f.sent / 1e6 for f in rows.values()], color="0.4")
    memory.set_yticks(at, names)
    memory.invert_yaxis()
    memory.set_xlabel(f"held by rank 0 of {ranks} (MB)")
    traffic.set_xlabel("sent in a step, as a ring (million elements)")
    figure.legend(frameon=False, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=150)


def positive(text: str) -> int:
    """Return an option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def main() -> None:
    """Measure every cut and report on rank 0."""
    parser = argparse.ArgumentParser(description="Tensor parallelism: memory, traffic and time of each cut.")
    parser.add_argument("--steps", type=positive, default=3, help="forward and backward passes of each cut")
    parser.add_argument("--width", type=positive, default=96, help=f"of the GPT, a multiple of {HEADS}")
    parser.add_argument(
        "--batch", type=positive, default=4, help="sequences of 64 tokens, or images of 32 × 32"
    )
    parser.add_argument("--out", type=Path, default=Path("07_tensor_parallel.png"), help="the picture")
    options = parser.parse_args()
    comm = minipar.world()
    screen = Console(quiet=comm.rank > 0)
    rows = {
        f"{name}, serial": serial(comm, kind, options)
        for name, kind in (("GPT", "gpt"), ("ConvNet", "convnet"))
    }
    if comm.size == 1:
        screen.print("One rank: nothing to cut. Start it with mpirun -n 4 to see the cuts.\n")
    else:
        rows |= {name: measure(comm, kind, cut, options) for name, (kind, cut) in CUTS.items()}
    rows = dict(sorted(rows.items(), key=lambda row: row[0].split(",")[0], reverse=True))  # the GPTs first
    table = Table()
    table.add_column(f"cut over {comm.size}", no_wrap=True)
    for heading in ("loss", "weights\nMB", "activations\nMB", "calls", "sent\nM", "time\nms"):
        table.add_column(heading, justify="right")
    for name, f in rows.items():
        numbers = f"{f.loss:.5f}", f"{f.weights / 1e6:.2f}", f"{f.activations / 1e6:.2f}", str(f.calls)
        table.add_row(name, *numbers, f"{f.sent / 1e6:.3f}", f"{1e3 * f.seconds:.0f}")
    screen.print(table)
    screen.print(
        "Held by rank 0 at the end of forward; collective calls and elements sent, as a ring, of forward and"
        " backward. The serial times were taken with the other ranks waiting."
    )
    if comm.rank == 0:
        picture(rows, options.out, comm.size)
        screen.print(f"picture: {options.out}")


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"):  # ranks that each start a thread a core wait for one another
        main()
