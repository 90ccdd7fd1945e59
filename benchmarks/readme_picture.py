"""Draws docs/equal_to_serial.png: a GPT trained serially and on four ranks, and how far the two ever differ.

    python benchmarks/readme_picture.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import minipar
from minipar.comm.interface import Communicator
from minipar.config import TrainConfig
from minipar.plot import COLOURS, new_figure
from minipar.training import Job

STEPS, RANKS = 120, 4
CONFIG = TrainConfig(
    model="gpt", steps=STEPS, batch=18, seq_len=32, width=64, layers=2, optimizer="sgd", momentum=0.9, lr=0.2,
    warmup=10, dtype="float64", device="cpu",
).resolved()  # fmt: skip


def history(comm: Communicator) -> list[tuple[float, list[np.ndarray]]]:
    """Return (loss, copies of all weights) after each step."""
    job = Job(CONFIG, comm)
    return [(record.loss, [p.data.copy() for p in job.model.parameters()]) for record in job.train()]


def main() -> None:
    serial = history(minipar.world())
    parallel = minipar.launch(lambda: history(minipar.world()), RANKS)[0]
    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    steps = range(1, STEPS + 1)
    left.plot(steps, [loss for loss, _ in serial], color=COLOURS[0], linewidth=4, alpha=0.4, label="serial")
    left.plot(steps, [loss for loss, _ in parallel], color=COLOURS[1], linewidth=1.2, label=f"{RANKS} ranks")
    left.set_xlabel("step")
    left.set_ylabel("loss (nats)")
    left.set_title("a GPT learns English, serially and in parallel")
    left.legend(frameon=False)
    errors = [
        max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs))
        for (_, ours), (_, theirs) in zip(parallel, serial)
    ]
    right.semilogy(steps, np.maximum(errors, 1e-17), color=COLOURS[1])
    right.axhline(1e-10, color="black", linestyle="--", linewidth=1)
    right.text(1, 1.5e-10, "tolerance of minipar verify")
    right.set_ylim(1e-17, 1e-8)
    right.set_xlabel("step")
    right.set_title("largest difference of any weight (float64)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path = Path(__file__).parent.parent / "docs" / "equal_to_serial.png"
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
