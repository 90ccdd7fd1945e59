"""float16 training on real ranks: without a loss scale, with one, and with an overflow on a single rank.

    mpirun -n 4 python lessons/10_mixed_precision/experiment.py

The ranks train an MLP on digits, data-parallel. Its loss is divided as if the batch were part of a much larger
one (`--part-of`), which makes gradients as small as those of a large job; Adam does not mind that, but zeros it
cannot use. In the last run the last rank's gradient becomes infinite at one step: all ranks must skip it.
On a single rank the same runs, with nobody to agree with.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import minipar
from minipar import optim, tensor
from minipar.amp import GradScaler, autocast
from minipar.comm import Communicator
from minipar.data import Data, Loader, load
from minipar.models import MLP, MLPConfig
from minipar.plot import COLOURS, new_figure, smoothed


@dataclass
class Found:
    """What one rank saw: losses and scales by step, steps its optimizer took, zeros in its gradients, weights' sum."""

    losses: list[float]
    scales: list[float]
    taken: int
    zeros: float
    digest: str


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64, help="samples of the batch, over all ranks")
    parser.add_argument("--part-of", type=float, default=2.0**24, help="samples of the batch that it is a part of")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("10_mixed_precision.png"), help="the picture")
    return parser.parse_args()


def train(
    comm: Communicator, data: Data, args: argparse.Namespace, amp: bool, scale: float | None, infinite_at: int = -1
) -> Found:
    """Train on all ranks; `scale` None switches the scaler off, `infinite_at` plants an infinity on the last rank."""
    channels, height, width = data.info["image_shape"]
    model = MLP(MLPConfig(channels * height * width, data.info["classes"], args.width, 3)).materialize(seed=0)
    adam = optim.Adam(model.parameters(), lr=3e-3, eps=1e-20)  # its eps is not to be larger than the gradients
    scaler = GradScaler(init_scale=scale or 1.0, growth_interval=25, enabled=scale is not None, comm=comm)
    loader = Loader(data.train, args.batch, rank=comm.rank, ranks=comm.size, seed=0, dtype=np.float32)
    found, zeros = Found([], [], 0, 0.0, ""), []
    with np.errstate(over="ignore", invalid="ignore"):  # the scaler looks for what overflows
        for step, batch in enumerate(loader.steps(args.steps)):
            model.zero_grad()
            with autocast("float16", enabled=amp):
                loss = model.loss(model(tensor(batch.inputs)), batch.targets)
            scaler.scale(loss / args.part_of).backward()
            for p in model.parameters():
                comm.all_reduce_(p.grad)  # float32, as the weights are
            if step == infinite_at and comm.rank == comm.size - 1:
                next(model.parameters()).grad[0] = np.inf
            found.scales.append(scaler.get_scale())
            found.taken += scaler.step(adam, lambda: (adam.step(), True)[1]) is True
            zeros.append(np.mean([np.mean(p.grad == 0) for p in model.parameters()]))
            scaler.update()
            total = comm.all_reduce(np.array([loss.item()]))[0]
            found.losses.append(float(total) / batch.count)
    found.zeros = float(np.mean(zeros))
    found.digest = sha256(b"".join(p.data.tobytes() for p in model.parameters())).hexdigest()
    return found


def draw(runs: dict[str, list[Found]], path: Path) -> None:
    """Draw losses and loss scales over steps; save the picture."""
    figure = new_figure(7.5, 5.5)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for (name, ranks), colour, style in zip(runs.items(), COLOURS, ("-", ":", "--", "-.")):
        top.plot(smoothed(ranks[0].losses, 0.8), style, color=colour, label=name)
        bottom.step(range(len(ranks[0].scales)), np.log2(ranks[0].scales), style, where="mid", color=colour)
    top.set_ylabel("loss (nats)")
    top.legend(frameon=False)
    bottom.set_ylabel("log2 of the loss scale")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=150)


def main() -> None:
    args, comm = options(), minipar.world()
    data = load("digits", "images")
    settings = {
        "float32": dict(amp=False, scale=None),
        "float16, no scale": dict(amp=True, scale=None),
        "float16, scaled": dict(amp=True, scale=2.0**40),
        "the same, infinity": dict(amp=True, scale=2.0**28, infinite_at=args.steps // 2),
    }
    runs = {name: comm.all_gather_object(train(comm, data, args, **kwargs)) for name, kwargs in settings.items()}
    if comm.rank != 0:
        return
    table = Table(title=f"{comm.size} rank{'s' * (comm.size > 1)}, {args.batch} samples as part of {args.part_of:,.0f}")
    for heading in ("run", "loss", "zeros", "steps by rank", "scale", "replicas"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, ranks in runs.items():
        first = ranks[0]
        scale = f"2^{np.log2(first.scales[-1]):.0f}" if first.scales[-1] > 1 else "–"
        same = "equal" if len({rank.digest for rank in ranks}) == 1 else "DIFFERENT"
        taken = " ".join(str(rank.taken) for rank in ranks)
        table.add_row(name, f"{np.mean(first.losses[-10:]):.3f}", f"{first.zeros:.1%}", taken, scale, same)
    Console().print(table)
    print("loss      mean of the last ten steps, in nats a sample")
    print("zeros     share of a gradient's elements that are zero, over all steps")
    print("steps     taken by the optimizer of each rank; the others were skipped")
    print("scale     the last one; replicas: whether all ranks end with the same weights, bit for bit")
    draw(runs, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"):  # the ranks themselves use the cores
        main()
