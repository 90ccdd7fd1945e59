"""Small trainings, serial and data-parallel, recorded step by step: what the tests of this folder compare.

The serial run is a plain loop over the plain model, without a wrapper or a communicator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipar import Tensor, launch, optim, random, world
from minipar.comm import Communicator
from minipar.data.batch import share
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig, Model
from minipar.parallel import DataParallel

SEED, LR, STEPS, BATCH, LAST_BATCH = 3, 0.1, 10, 7, 4
Arrays = dict[str, np.ndarray]
Piece = tuple[np.ndarray, np.ndarray]

MODELS: dict[str, Callable[[], Model]] = {
    "mlp": lambda: MLP(MLPConfig(inputs=12, classes=5, width=8, layers=3, dropout=0.2)),
    "convnet": lambda: ConvNet(ConvNetConfig(channels=2, size=6, classes=5, width=4, layers=2, groups=2)),
    "convnet-batch-norm": lambda: ConvNet(ConvNetConfig(2, 6, 5, width=4, layers=2, norm="batch")),
    "gpt-tied": lambda: GPT(GPTConfig(vocab=11, seq_len=6, width=8, layers=2, heads=2, dropout=0.1)),
    "gpt-untied": lambda: GPT(
        GPTConfig(vocab=11, seq_len=6, width=8, layers=1, heads=2, dropout=0.1, tied=False)
    ),
}


@dataclass
class Step:
    """What a rank held after one step; gradients as before the update."""

    loss: float
    gradients: Arrays
    state: Arrays


def build(kind: str, dtype: str = "float64", seed: int = SEED) -> Model:
    return MODELS[kind]().materialize(seed, dtype)


def batches(kind: str, dtype: str = "float64", steps: int = STEPS) -> list[Piece]:
    """Global batches of 7 samples, every third one of 4: neither is divided by 2, 3 or 5."""
    rng = np.random.default_rng(1)
    made = []
    for step in range(steps):
        n = LAST_BATCH if step % 3 == 2 else BATCH
        if kind.startswith("gpt"):
            made.append((rng.integers(0, 11, (n, 6)), rng.integers(0, 11, (n, 6))))
        else:
            shape = (n, 12) if kind == "mlp" else (n, 2, 6, 6)
            made.append((rng.standard_normal(shape).astype(dtype), rng.integers(0, 5, n)))
    return made


def loss_sum(model: Model, inputs: np.ndarray, targets: np.ndarray) -> Tensor:
    return model.loss(model(inputs if inputs.dtype.kind == "i" else Tensor(inputs)), targets)


def gradients(model: Model) -> Arrays:
    return {name: p.grad.copy() for name, p in model.named_parameters() if p.grad is not None}


def sgd(model: Model) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=LR, momentum=0.5)


def serial(
    kind: str, dtype: str = "float64", optimizer: Callable[[Model], optim.Optimizer] = sgd, steps: int = STEPS
) -> list[Step]:
    """The plain training loop."""
    model = build(kind, dtype)
    update, steps_taken = optimizer(model), []
    for step, (inputs, targets) in enumerate(batches(kind, dtype, steps)):
        model.zero_grad()
        with random.at(seed=SEED, step=step, first_sample=0):
            loss = loss_sum(model, inputs, targets) / targets.size
            loss.backward()
        found = gradients(model)
        update.step()
        steps_taken.append(Step(loss.item(), found, model.state_dict()))
    return steps_taken


def data_parallel(
    comm: Communicator,
    kind: str,
    dtype: str = "float64",
    *,
    microbatches: int = 1,
    optimizer: Callable[[Model], optim.Optimizer] = sgd,
    steps: int = STEPS,
    **options: Any,
) -> list[Step]:
    """One rank's part of the same; every rank has a seed of its own, so that the broadcast matters."""
    model = build(kind, dtype, SEED + comm.rank)
    parallel, update, steps_taken = DataParallel(model, comm, **options), optimizer(model), []
    for step, (inputs, targets) in enumerate(batches(kind, dtype, steps)):
        model.zero_grad()
        mine = share(len(inputs), comm.rank, comm.size)
        total = 0.0
        for i in range(microbatches):
            part = share(mine.stop - mine.start, i, microbatches)
            part = slice(mine.start + part.start, mine.start + part.stop)

            def backward(
                part: slice = part, step: int = step, inputs: Any = inputs, targets: Any = targets
            ) -> float:
                with random.at(seed=SEED, step=step, first_sample=part.start):
                    loss = loss_sum(model, inputs[part], targets[part]) / targets.size
                    loss.backward()
                return loss.item()

            if i < microbatches - 1:
                with parallel.no_sync():
                    total += backward()
            else:
                total += backward()
        loss = float(comm.all_reduce(np.array([total]))[0])
        found = gradients(model)
        parallel.step(update)
        steps_taken.append(Step(loss, found, model.state_dict()))
    return steps_taken


def on_threads(ranks: int, kind: str, dtype: str = "float64", **options: Any) -> list[list[Step]]:
    """`data_parallel` on so many threads: for each rank its steps."""
    return launch(lambda: data_parallel(world(), kind, dtype, **options), ranks, timeout=30)


def worst_error(ours: Arrays, theirs: Arrays, scale: float) -> tuple[float, str]:
    """The largest max|a - b| / max(max|b|, 1e-3 scale) over all tensors, and where."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    errors = {}
    for name, b in theirs.items():
        assert ours[name].shape == b.shape and ours[name].dtype == b.dtype, name
        errors[name] = float(np.abs(ours[name] - b).max() / max(np.abs(b).max(), 1e-3 * scale, 1e-300))
    name = max(errors, key=lambda n: errors[n])
    return errors[name], name


def assert_equal_steps(
    ours: list[Step], theirs: list[Step], tolerance: float = 1e-10, compare_gradients: bool = True
) -> None:
    """Loss, every gradient and every weight at every step, by the measure of the design."""
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs)):
        scale = max(np.abs(g).max() for g in b.gradients.values())
        assert abs(a.loss - b.loss) <= tolerance * abs(b.loss), f"loss, step {number}"
        if compare_gradients:
            error, name = worst_error(a.gradients, b.gradients, scale)
            assert error <= tolerance, f"gradient of {name}, step {number}: {error:.1e}"
        error, name = worst_error(a.state, b.state, scale)
        assert error <= tolerance, f"{name}, step {number}: {error:.1e}"


def assert_replicas_bitwise(of_ranks: list[list[Step]]) -> None:
    """All ranks hold the same bits after every step."""
    for steps in zip(*of_ranks):
        bits = [{name: value.tobytes() for name, value in step.state.items()} for step in steps]
        assert all(other == bits[0] for other in bits[1:])
