"""One training run that moves through every layout of its ranks, by checkpoints, and ends where serial training does.

    mpirun -n 4 python lessons/11_three_axes/experiment.py

A GPT trains some steps on one (dp, pp, tp), saves, and goes on from the checkpoint on the next one. Beside it,
rank 0 trains the serial model without a break. The table has what each layout holds and sends, and how far the
losses are from the serial ones; the picture has both curves. On a single rank there is one layout only.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import minipar
from minipar.comm import Communicator
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.data import Data, load
from minipar.mesh import factorings
from minipar.plot import COLOURS, new_figure
from minipar.resume import resume, save_job
from minipar.training import Job

AXES = ("dp", "pp", "tp")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="on each layout")
    parser.add_argument("--head-width", type=int, default=8, help="channels of a head; 4 heads, or one a rank")
    parser.add_argument("--layers", type=int, help="transformer blocks [default: 4, or the number of ranks]")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("11_three_axes.png"), help="the picture")
    return parser.parse_args()


def config(args: argparse.Namespace, steps: int, **layout: Any) -> TrainConfig:
    width = args.heads * args.head_width
    sizes = dict(width=width, layers=args.layers, heads=args.heads, seq_len=16, batch=args.batch)
    fixed = dict(model="gpt", optimizer="adamw", lr=3e-3, dropout=0.1, dtype="float64", device="cpu", steps=steps)
    return TrainConfig(**fixed, **sizes, **layout).resolved(VERIFY_DEFAULTS)


def sent_by_axis(job: Job) -> Counter[str]:
    """Return the bytes that this rank has sent along each axis, with every operation in its ring form."""
    sent: Counter[str] = Counter()
    for row in job.comm.ledger.rows():
        if row.elements and "/" in row.group:
            sent[row.group.split("/")[1][:2]] += round(float(row.ring_elements) * row.bytes / row.elements)
    return sent


def train(job: Job, steps: int) -> tuple[list[float], float]:
    """Train so many steps; return their losses and seconds a step."""
    losses: list[float] = []
    start = time.perf_counter()
    for record in job.train():
        losses.append(record.loss)
        if len(losses) == steps:
            break
    return losses, (time.perf_counter() - start) / steps


def serial_losses(comm: Communicator, args: argparse.Namespace, steps: int, data: Data) -> list[float]:
    """Train the serial model on rank 0; return its losses on every rank."""
    alone = comm.split(comm.rank)
    assert alone is not None
    losses = train(Job(config(args, steps), alone, data), steps)[0] if comm.rank == 0 else None
    return comm.broadcast_object(losses)


def draw(rows: list[tuple[str, list[float]]], serial: list[float], path: Path) -> None:
    """Draw the loss over steps, each layout's stretch in a colour of its own; save the picture."""
    figure = new_figure(8.0, 4.0)
    axes = figure.subplots()
    axes.plot(range(1, len(serial) + 1), serial, color="0.75", linewidth=6, label="serial, without a break")
    first = 1
    for i, (name, losses) in enumerate(rows):
        steps = range(first, first + len(losses))
        axes.plot(steps, losses, color=COLOURS[i % len(COLOURS)], marker="osD^v"[i % 5], label=name)
        first += len(losses)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.legend(frameon=False, title="dp×pp×tp", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    args, comm = options(), minipar.world()
    args.layers = args.layers or max(4, comm.size)  # a block for each stage
    args.heads = 4 if 4 % comm.size == 0 else comm.size  # tensor parallelism cuts between heads
    layouts, data = factorings(comm.size), load("docs", seq_len=16)
    steps = args.steps * len(layouts)
    serial = serial_losses(comm, args, steps, data)
    folder = Path(comm.broadcast_object(tempfile.mkdtemp() if comm.rank == 0 else None))
    table = Table(title=f"{comm.size} rank{'s' * (comm.size > 1)}, {args.steps} steps on each layout")
    for heading in ("dp×pp×tp", "holds", "over dp", "over pp", "over tp", "step (ms)", "loss", "off serial"):
        table.add_column(heading, justify="right")
    rows: list[tuple[str, list[float]]] = []
    for i, sizes in enumerate(layouts):
        layout = dict(zip(AXES, sizes)) | ({"microbatches": 2 * sizes[1]} if sizes[1] > 1 else {})
        job = Job(config(args, steps, **layout), comm, data)
        if i:
            resume(job, folder)
        comm.ledger.reset()
        losses, seconds = train(job, args.steps)
        sent = sent_by_axis(job)
        save_job(job, folder, keep=1)
        held = sum(h.tensor.data.nbytes for h in job.strategy.parameters_held())
        everyone = comm.all_gather_object((held, sent))
        if comm.rank == 0:
            name = "×".join(map(str, sizes))
            most = [max(s[axis] for _, s in everyone) / args.steps / 1024 for axis in AXES]
            done = len(losses) * len(rows)
            off = max(abs(a - b) for a, b in zip(losses, serial[done:]))
            cells = [f"{max(h for h, _ in everyone) / 1024:.0f}", *(f"{n:.0f}" for n in most)]
            table.add_row(name, *cells, f"{1000 * seconds:.0f}", f"{losses[-1]:.4f}", f"{off:.0e}")
            rows.append((name, losses))
    if comm.rank == 0:
        shutil.rmtree(folder)
        Console().print(table)
        print("holds       KiB of parameters, the fullest rank")
        print("over        KiB sent along an axis in a step by the rank that sends most, operations in their ring form")
        print("off serial  largest difference of a loss from the serial run's at the same step")
        if comm.size == 1:
            print("one rank has one layout; four have six: mpirun -n 4 python lessons/11_three_axes/experiment.py")
        draw(rows, serial, args.out)
        print(f"picture: {args.out}")


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"):  # the ranks themselves use the cores
        main()
