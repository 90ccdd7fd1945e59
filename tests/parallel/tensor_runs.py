"""Small trainings, serial and cut over ranks, recorded step by step: what a rank holds of every tensor.

`SCENARIOS` are whole comparisons that one rank of any engine can run; the tests use them on threads and MPI.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipar import Tensor, optim, random
from minipar.comm import Communicator
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig, Model
from minipar.nn import Parameter
from minipar.parallel.norms import global_norm
from minipar.parallel.placement import is_sharded
from minipar.parallel.tensor_parallel.parallelize import parallelize
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.recompute import recompute

SEED, LR, STEPS = 3, 0.1, 10
LENGTHS = (7, 3, 8, 1, 5)  # tokens, step by step: no two alike after one another, few divided by the ranks
Array = np.ndarray


def gpt(width: int, heads: int, tied: bool = True, dropout: float = 0.1) -> Model:
    return GPT(GPTConfig(97, 8, width, 2, heads, dropout, tied))


def convnet(layers: int = 2) -> Model:
    return ConvNet(ConvNetConfig(channels=3, size=9, classes=5, width=6, layers=layers, groups=3))


MODELS: dict[str, Callable[[], Model]] = {
    "gpt-tied": lambda: gpt(60, 4),
    "gpt-untied": lambda: gpt(60, 4, tied=False),
    "gpt-3-heads": lambda: gpt(15, 3),
    "convnet": convnet,
    "mlp-1": lambda: MLP(MLPConfig(15, 7, 7, 1, 0.2)),
    "mlp-2": lambda: MLP(MLPConfig(15, 7, 7, 2, 0.2)),
    "mlp-3": lambda: MLP(MLPConfig(15, 4, 7, 3, 0.2)),
    "mlp-4": lambda: MLP(MLPConfig(15, 7, 3, 4, 0.2)),
}


def batch(kind: str, step: int) -> tuple[Any, Array]:
    rng = np.random.default_rng(step)
    if kind.startswith("gpt"):
        shape = (3, LENGTHS[step % len(LENGTHS)])
        targets = rng.integers(0, 97, shape)
        targets[0, 0] = -100  # ignored
        return rng.integers(0, 97, shape), targets
    if kind.startswith("mlp"):
        return rng.standard_normal((5, 15)), rng.integers(0, 4, 5)
    height = 9 if step % 2 else 6  # images of two sizes
    return rng.standard_normal((3, 3, height, 7)), rng.integers(0, 5, 3)


@dataclass
class Step:
    """What a rank held after one step; gradients as before clipping."""

    loss: float
    gradients: dict[str, Array]
    state: dict[str, Array]


def whole(p: Parameter, local: Array) -> Array:
    return local if p.layout is None else p.layout.whole(local, p.global_shape)


def own(p: Parameter, serial: Array) -> Array:
    return serial if p.layout is None else p.layout.local(serial)


def loss_of(model: Model, x: Any, targets: Array, recomputed: bool = False) -> Tensor:
    h = x if x.dtype.kind == "i" else Tensor(x)
    for block in model.blocks:
        h = recompute(block, h) if recomputed else block(h)
    return model.loss(h, targets)


def train(
    kind: str,
    comm: Communicator | None = None,
    *,
    steps: int = STEPS,
    pieces: int = 1,
    recomputed: bool = False,
    clip: float = 0.0,
    materialize_first: bool = False,
    **plan: Any,
) -> tuple[Model, list[Step]]:
    """Train with SGD, serially or (given ranks) cut over them."""
    model = MODELS[kind]()
    if materialize_first:
        model.materialize(SEED, "float64")
    if comm is not None:
        parallelize(model, comm, default_plan(model, **plan))
    if not materialize_first:
        model.materialize(SEED, "float64")
    optimizer, taken = optim.SGD(model.parameters(), lr=LR, momentum=0.5), []
    for step in range(steps):
        x, targets = batch(kind, step)
        model.zero_grad()
        loss, count = 0.0, int((targets != -100).sum())
        for part in np.array_split(np.arange(len(x)), pieces):
            with random.at(seed=SEED, step=step, first_sample=int(part[0])):
                piece = loss_of(model, x[part], targets[part], recomputed) / count
                piece.backward()
            loss += piece.item()
        gradients = {name: p.grad.copy() for name, p in model.named_parameters()}
        if clip:
            norm = global_norm([(p, p) for p in model.parameters()], shard_comm=None, tp=comm)
            optim.clip_grad_norm_(model.parameters(), clip, norm)
        optimizer.step()
        taken.append(Step(loss, gradients, {name: p.data.copy() for name, p in model.named_parameters()}))
    return model, taken


@functools.cache
def serial(kind: str, steps: int = STEPS, clip: float = 0.0) -> list[Step]:
    return train(kind, steps=steps, clip=clip)[1]


def equals_serial(comm: Communicator, kind: str, tolerance: float = 1e-10, **options: Any) -> None:
    """Compare what this rank holds with the serial training; what all hold whole must be bitwise the same.

    The measure is the design's, max|a - b| ≤ tolerance · max(max|b|, 1e-3 × the largest gradient), where b
    is the whole serial tensor, also for a part of it.
    """
    model, ours = train(kind, comm, **options)
    theirs = serial(kind, options.get("steps", STEPS), options.get("clip", 0.0))
    parameters, digest = dict(model.named_parameters()), hashlib.sha256()
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = max(np.abs(g).max() for g in b.gradients.values())
        assert abs(a.loss - b.loss) <= tolerance * abs(b.loss), f"loss, step {number}"
        digest.update(np.float64(a.loss).tobytes())
        for what, mine, full in (("gradient", a.gradients, b.gradients), ("weight", a.state, b.state)):
            assert mine.keys() == full.keys() == parameters.keys()
            for name, p in parameters.items():
                part, size = own(p, full[name]), max(np.abs(full[name]).max(), 1e-3 * scale)
                assert mine[name].shape == part.shape and mine[name].dtype == part.dtype, name
                error = np.abs(mine[name] - part).max(initial=0.0) / size
                assert error <= tolerance, f"{what} of {name}, step {number}: {error:.1e}"
                if not is_sharded(p):
                    digest.update(mine[name].tobytes())
    assert len(set(comm.all_gather_object(digest.hexdigest()))) == 1, "replicas differ"


@dataclass(frozen=True)
class Scenario:
    kind: str
    options: dict[str, Any]

    def __call__(self, comm: Communicator) -> None:
        equals_serial(comm, self.kind, **self.options)


# Short runs, for real MPI: any number of ranks up to 3.
SCENARIOS = {
    "vocabulary and heads": Scenario("gpt-3-heads", {"steps": 3}),
    "sequence parallel, recomputed": Scenario(
        "gpt-3-heads", {"steps": 5, "sequence_parallel": True, "recomputed": True}
    ),
    "columns and rows": Scenario("mlp-3", {"steps": 3, "clip": 0.1}),
    "output channels": Scenario("convnet", {"steps": 2, "convolution": "output"}),
    "input channels": Scenario("convnet", {"steps": 2, "convolution": "input"}),
    "image region": Scenario("convnet", {"steps": 3, "convolution": "region"}),
}
