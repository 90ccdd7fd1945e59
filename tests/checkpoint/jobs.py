"""Small training jobs under many layouts, and what to compare of them: shared by this folder's tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minipar import launch, world
from minipar.checkpoint import Reader, newest, open_checkpoint
from minipar.comm import Communicator
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.data import Data, load
from minipar.resume import resume, save_job
from minipar.training import Job
from minipar.verification import Fewer

Arrays = dict[str, np.ndarray]
STEPS = 6
# Relative difference of losses between two layouts. In float64 sums over ranks round in another order. In fp16 each
# logit is rounded by half a unit of 2^-10 besides, and the mean over some 80 targets has a ninth of that (1/√80).
LOSS_TOLERANCE = {"float64": 1e-10, "fp16": 2.0**-10 / 8}


@functools.cache
def data(kind: str) -> Data:
    """Few samples: an epoch of the batch of 10 ends within the run."""
    whole = load("docs", seq_len=8) if kind == "gpt" else load("digits")
    return Data(Fewer(whole.train, 23), Fewer(whole.valid, 17), whole.info, whole.vocabulary)


SIZES: dict[str, dict[str, Any]] = {
    "gpt": {"width": 16, "layers": 4, "heads": 8, "seq_len": 8, "dropout": 0.1},
    "mlp": {"width": 8, "layers": 3, "dropout": 0.1},
    "convnet": {"width": 8, "layers": 2},
}


def job(comm: Communicator, kind: str = "gpt", **changes: Any) -> Job:
    settings = {"model": kind, "steps": STEPS, "batch": 10, "lr": 0.01, **SIZES[kind], **changes}
    return Job(TrainConfig(**settings).resolved(VERIFY_DEFAULTS), comm, data(kind))


def steps(made: Job, number: int) -> list[float]:
    """Train `number` steps; return their losses."""
    losses: list[float] = []
    for record in made.train() if number else ():
        losses.append(record.loss)
        if len(losses) == number:
            break
    return losses


def overflow_once(made: Job) -> None:
    """Have a gradient of the next step overflow on the last rank that holds one, so that all ranks skip that step."""
    ordinary = made.precision.unscale

    def unscale(optimizer: Any) -> bool:
        made.precision.unscale = ordinary  # type: ignore[method-assign]
        grads = [t.grad for t in optimizer.tensors() if t.grad is not None and t.grad.size]
        holders = [rank for rank, holds in enumerate(made.comm.all_gather_object(bool(grads))) if holds]
        if made.comm.rank == holders[-1]:
            grads[0].flat[0] = np.inf
        return ordinary(optimizer)

    made.precision.unscale = unscale  # type: ignore[method-assign]


def saved_state(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Return everything a checkpoint holds, in the serial model's terms."""
    path = newest(path)
    manifest = open_checkpoint(path)
    with Reader(path) as reader:
        arrays = {f"{t.kind} {t.name}": reader.tensor(t) for t in manifest.tensors}
    scalars = {k: v for k, v in manifest.scalars.items() if k != "seconds"}
    return arrays, {"step": manifest.step, **scalars}


def train_and_save(
    ranks: int, directory: Path, kind: str, number: int, prepare: Callable[[Job], None] | None = None, **layout: Any
) -> list[float]:
    """Train a fresh job, to which `prepare` may do something before, and save it; return its losses."""

    def program() -> list[float]:
        made = job(world(), kind, **layout)
        if prepare is not None:
            prepare(made)
        losses = steps(made, number)
        save_job(made, directory)
        return losses

    return launch(program, ranks)[0]


def pass_on(ranks: int, source: Path, target: Path, kind: str, number: int = 0, **layout: Any) -> list[float]:
    """Load a checkpoint on another layout and save it again; then train on and return the losses."""

    def program() -> list[float]:
        made = job(world(), kind, **layout)
        resume(made, source)
        save_job(made, target)
        return steps(made, number)

    return launch(program, ranks)[0]


def assert_same(a: tuple[Arrays, dict[str, Any]], b: tuple[Arrays, dict[str, Any]]) -> None:
    """Bitwise the same tensors, and the same scalars."""
    assert a[0].keys() == b[0].keys()
    for name, value in a[0].items():
        assert value.dtype == b[0][name].dtype and value.tobytes() == b[0][name].tobytes(), name
    assert a[1] == b[1]
