"""ZeRO on real ranks: bytes held, elements moved and time a step, for stages 0 to 3.

    mpirun -n 4 python lessons/06_sharding/experiment.py

Trains a small GPT with AdamW in every stage, prints a table with the formulas beside what was measured, and
saves a picture. On a single rank there is nothing to cut: all stages hold the same and send nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import minipar
from minipar import optim
from minipar.comm import Communicator, Ledger
from minipar.models import GPT, GPTConfig
from minipar.parallel.data_parallel import DataParallel
from minipar.parallel.memory import held, zero_formula
from minipar.parallel.zero import Zero
from minipar.plot import COLOURS, new_figure

STAGES = (0, 1, 2, 3)
KINDS = ("parameters", "gradients", "optimizer")


@dataclass
class Found:
    """What one rank measured of one stage: bytes by kind, the ledger of a step, seconds a step, the loss."""

    bytes: dict[str, int]
    sent: Ledger
    seconds: float
    loss: float


def measure(comm: Communicator, stage: int, options: argparse.Namespace) -> Found:
    """Train `options.steps` steps; what is held and sent is that of the last one."""
    config = GPTConfig(vocab=96, seq_len=32, width=options.width, layers=options.layers, heads=4)
    ids = np.random.default_rng(0).integers(0, config.vocab, (options.batch, config.seq_len + 1))
    mine = np.array_split(ids, comm.size)[comm.rank]
    model = GPT(config)
    wrapper: DataParallel | Zero
    if stage == 0:
        wrapper = DataParallel(model.materialize(seed=0), comm)
        optimizer = optim.AdamW(model.parameters())
    else:
        wrapper = Zero(model, comm, stage).materialize(seed=0)
        optimizer = optim.AdamW([piece for _, piece in wrapper.shards()])
    state = model if isinstance(wrapper, DataParallel) else wrapper
    times, total, gradients = [], 0.0, 0
    for step in range(options.steps):
        comm.mark(step=step)
        comm.ledger.reset()
        comm.barrier()
        begin = comm.now()
        optimizer.zero_grad()
        total = 0.0
        for i, piece in enumerate(np.array_split(mine, options.microbatches)):
            last = i == options.microbatches - 1
            with contextlib.nullcontext() if last else wrapper.no_sync():
                loss = model.loss(wrapper(piece[:, :-1]), piece[:, 1:]) / (options.batch * config.seq_len)
                loss.backward()
            total += loss.item()
            if step == 0:
                gradients = max(gradients, held(state).gradients)
        wrapper.step(optimizer)
        times.append(comm.now() - begin)
    sent = copy.deepcopy(comm.ledger)
    now = held(state, optimizer)
    whole_loss = float(comm.all_reduce(np.array([total]))[0])
    found = {"parameters": now.parameters, "gradients": gradients, "optimizer": now.optimizer}
    return Found(found, sent, statistics.median(times[1:] or times), whole_loss)


def moved(found: Found, ranks: int) -> float:
    """Return elements of parameters and gradients sent, as a ring; flags (one byte each) are left out."""
    rows = [row for row in found.sent.rows() if row.elements != row.bytes]
    return float(sum(row.ring_elements for row in rows)) if ranks > 1 else 0.0


def moved_formula(stage: int, numel: int, ranks: int, k: int) -> float:
    """Return the same by formula: 2, 2, k + 1 and 3k times Ψ (N - 1)/N."""
    return (2, 2, k + 1, 3 * k)[stage] * numel * (ranks - 1) / ranks


def picture(found: dict[int, Found], numel: int, ranks: int, path: Path) -> None:
    """Draw bytes a parameter on one rank, by stage and kind, with the formula's sums as marks."""
    figure = new_figure(7.0, 3.4)
    axes = figure.subplots()
    rows, left = range(len(STAGES)), np.zeros(len(STAGES))
    for colour, kind in zip(COLOURS, KINDS):
        size = np.array([found[stage].bytes[kind] / numel for stage in STAGES])
        axes.barh(rows, size, left=left, color=colour, edgecolor="white", label=kind)
        left += size
    sums = [float(sum(zero_formula(1, ranks, stage, 4, 2).values())) for stage in STAGES]
    axes.plot(sums, rows, "k|", markersize=28, markeredgewidth=2, label="formula")
    axes.set_yticks(rows, [f"stage {stage}" for stage in STAGES])
    axes.invert_yaxis()
    axes.set_xlabel(f"bytes a parameter on rank 0 of {ranks} (float32, AdamW)")
    figure.legend(frameon=False, ncols=4, markerscale=0.5, loc="outside lower center")
    figure.savefig(path, dpi=150)


def positive(text: str) -> int:
    """Return an option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def main() -> None:
    """Measure every stage and report on rank 0."""
    parser = argparse.ArgumentParser(description="ZeRO: memory, traffic and time of stages 0 to 3.")
    parser.add_argument("--steps", type=positive, default=3, help="steps for each stage")
    parser.add_argument("--width", type=positive, default=64, help="of the GPT, a multiple of 4")
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--batch", type=positive, default=16, help="sequences of 32 tokens, over all ranks")
    parser.add_argument(
        "--microbatches", type=positive, default=2, help="pieces of each rank's part of the batch"
    )
    parser.add_argument("--out", type=Path, default=Path("06_sharding.png"), help="the picture")
    options = parser.parse_args()
    comm = minipar.world()
    screen = Console(quiet=comm.rank > 0)
    if comm.size == 1:
        screen.print("One rank: nothing to share. Start it with mpirun -n 4 to see the stages differ.\n")
    model = GPT(GPTConfig(96, 32, options.width, options.layers, 4))
    numel = sum(int(np.prod(p.global_shape)) for p in model.parameters())
    found = {stage: measure(comm, stage, options) for stage in STAGES}
    k = options.microbatches
    screen.print(f"GPT of {numel:,} parameters, {comm.size} ranks, {k} microbatches")
    table = Table()
    for heading in ("stage", "MB held", "formula", "elements sent", "formula", "ms a step", "loss"):
        table.add_column(heading, justify="right")
    for stage, f in found.items():
        formula = float(sum(zero_formula(numel, comm.size, stage, 4, 2).values()))
        sent, expected = moved(f, comm.size), moved_formula(stage, numel, comm.size, k)
        table.add_row(
            str(stage), f"{sum(f.bytes.values()) / 1e6:.3f}", f"{formula / 1e6:.3f}", f"{sent:,.0f}",
            f"{expected:,.0f}", f"{1e3 * f.seconds:.0f}", f"{f.loss:.5f}",
        )  # fmt: skip
    screen.print(table)
    screen.print(
        "Held: parameters, gradients between two microbatches, Adam's moments, on rank 0. The loss is that of the"
        " last step, the same in every stage."
    )
    if k == 1:
        screen.print(
            "With one microbatch stage 1 sums its gradients at once and keeps no whole ones: less than 4Ψ."
        )
    if comm.rank == 0:
        picture(found, numel, comm.size, options.out)
        screen.print(f"picture: {options.out}")


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"):  # ranks that each start a thread a core wait for one another
        main()
