"""Small trainings under ZeRO and the plain serial ones beside them, recorded step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from minipar import Tensor, launch, nn, ops, optim, random, world
from minipar.comm import Communicator
from minipar.data.batch import Batch, share
from minipar.mesh import Mesh
from minipar.models import MLP, MLPConfig, Model
from minipar.parallel.distribute import Recipe, distribute
from minipar.parallel.strategies import Sharded
from minipar.parallel.zero.zero import Zero
from tests.parallel import training_runs
from tests.parallel.training_runs import SEED, Arrays, Step, batches, gradients, loss_sum

STEPS = 4
Build = Callable[[list[Tensor]], optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda ts: optim.SGD(ts, lr=0.1, weight_decay=0.01),
    "momentum": lambda ts: optim.SGD(ts, lr=0.1, momentum=0.9),
    "adam": lambda ts: optim.Adam(ts, lr=0.01),
    "adamw": lambda ts: optim.AdamW(ts, lr=0.01),
}


def make(kind: str) -> Model:
    """A model without values; "uneven" has weights of 7 × 15 and 7 × 7, which no number of ranks divides."""
    if kind == "uneven":
        return MLP(MLPConfig(inputs=15, classes=5, width=7, layers=3))
    return training_runs.MODELS[kind]()


def data(kind: str, steps: int = STEPS) -> list[tuple[np.ndarray, np.ndarray]]:
    if kind != "uneven":
        return batches(kind, steps=steps)
    rng = np.random.default_rng(2)
    return [(rng.standard_normal((n, 15)), rng.integers(0, 5, n)) for n in (7, 7, 4, 7)[:steps]]


def serial(kind: str, optimizer: str = "sgd", clip: float = 0.0, steps: int = STEPS) -> list[Step]:
    """The plain loop over the plain model."""
    model = make(kind).materialize(SEED, "float64")
    update, taken = OPTIMIZERS[optimizer](list(model.parameters())), []
    for step, (inputs, targets) in enumerate(data(kind, steps)):
        model.zero_grad()
        with random.at(seed=SEED, step=step, first_sample=0):
            loss = loss_sum(model, inputs, targets) / targets.size
            loss.backward()
        found = gradients(model)
        if clip:
            optim.clip_grad_norm_(model.parameters(), clip)
        update.step()
        taken.append(Step(loss.item(), found, model.state_dict()))
    return taken


def loss_of(zero: Zero, inputs: np.ndarray, targets: np.ndarray) -> Tensor:
    """The sum of the losses of these samples."""
    return zero.model.loss(zero(inputs if inputs.dtype.kind == "i" else Tensor(inputs)), targets)


def microbatches(
    zero: Zero, inputs: np.ndarray, targets: np.ndarray, step: int, k: int, rank: int, ranks: int
) -> float:
    """Forward and backward of this rank's share of a batch in k pieces; returns its part of the mean loss."""
    mine, total = share(len(inputs), rank, ranks), 0.0
    for i in range(k):
        part = share(mine.stop - mine.start, i, k)
        part = slice(mine.start + part.start, mine.start + part.stop)
        waiting = zero.no_sync() if i < k - 1 else contextlib.nullcontext()
        with waiting, random.at(seed=SEED, step=step, first_sample=part.start):
            loss = loss_of(zero, inputs[part], targets[part]) / targets.size
            loss.backward()
        total += loss.item()
    return total


def train(
    comm: Communicator, kind: str, stage: int, optimizer: str = "sgd", *, k: int = 1, clip: float = 0.0,
    steps: int = STEPS, materialized: bool = False, model: Model | None = None, **options: Any,
) -> list[Step]:
    """One rank's part of the same under ZeRO, unmaterialised unless told otherwise."""
    model = make(kind) if model is None else model
    if materialized:  # each rank from a seed of its own but the first, whose values count
        zero = Zero(model.materialize(SEED + comm.rank, "float64"), comm, stage, **options)
    else:
        zero = Zero(model, comm, stage, **options).materialize(SEED, "float64")
    update, taken = OPTIMIZERS[optimizer]([t for _, t in zero.shards()]), []
    for step, (inputs, targets) in enumerate(data(kind, steps)):
        zero.zero_grad()
        total = microbatches(zero, inputs, targets, step, k, comm.rank, comm.size)
        loss = float(comm.all_reduce(np.array([total]))[0])
        found = zero.full("grad")
        if clip:
            optim.clip_grad_norm_([t for _, t in zero.shards()], clip, zero.grad_norm())
        zero.step(update)
        taken.append(Step(loss, found, whole_state(zero)))
    return taken


def norms_of(steps: list[Step]) -> list[float]:
    """The norm of each step's gradient."""
    return [float(np.sqrt(sum((g**2).sum() for g in step.gradients.values()))) for step in steps]


def train_over_cut_model(
    comm: Communicator, stage: int, sequence_parallel: bool, clip: float, expected: list[Step],
    norms: list[float],
) -> None:  # fmt: skip
    """SGD on "gpt-tied" over tp 2 × dp, under ZeRO or (stage 0) plain data parallelism, equals `expected`."""
    mesh, model = Mesh(comm, dp=comm.size // 2, tp=2), make("gpt-tied")
    recipe = Recipe(zero=stage, sequence_parallel=sequence_parallel)
    strategy = distribute(model, mesh, recipe, seed=SEED, dtype="float64")
    tensors = [t for _, t in strategy.optimizer_tensors()]
    update, layouts = OPTIMIZERS["sgd"](tensors), {p.name: p.layout for p in model.parameters()}
    for step, (inputs, targets) in enumerate(data("gpt-tied", len(expected))):
        update.zero_grad()
        model.zero_grad()
        mine = share(len(inputs), mesh.dp.rank, mesh.dp.size)
        n = np.arange(len(inputs))
        batch = Batch(inputs[mine], targets[mine], n[mine], mine.start, len(inputs), targets.size)
        with random.at(seed=SEED, step=step, first_sample=mine.start):
            strategy.add_gradients(batch, targets.size, last=True)
        scale = max(np.abs(g).max() for g in expected[step].gradients.values())
        held = {"gradient": {name: g.copy() for name, g in strategy.held("grad").items()}}
        norm = strategy.grad_norm()
        assert norm is not None and abs(norm / norms[step] - 1) <= 1e-10
        if isinstance(strategy, Sharded):
            assert strategy.zero.grad_norm() == norm
        optim.clip_grad_norm_(tensors, clip, norm)
        strategy.step(update, 0)
        held["weight"] = strategy.held("data")
        for what, theirs in (("gradient", expected[step].gradients), ("weight", expected[step].state)):
            for name, whole in theirs.items():
                local = whole if layouts[name] is None else layouts[name].local(whole)
                error = np.abs(held[what][name] - local).max() / max(np.abs(local).max(), 1e-3 * scale)
                assert error <= 1e-10, (what, name, step)


def whole_state(zero: Zero) -> Arrays:
    """Parameters and buffers, whole."""
    buffers = {name: b.data.copy() for name, b in zero.model.named_buffers()}
    return {**{name: value.copy() for name, value in zero.full().items()}, **buffers}


def on_threads(ranks: int, *arguments: Any, **options: Any) -> list[list[Step]]:
    """`train` on so many threads: for each rank its steps."""
    return launch(lambda: train(world(), *arguments, **options), ranks, timeout=30)


# Parameters that some ranks do not use ------------------------------------------------------------


class Branch(nn.Module):
    """A linear layer, and one that is added if `extra` says so."""

    def __init__(self) -> None:
        self.fc, self.other, self.never = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.extra = True

    def forward(self, x: Tensor) -> Tensor:
        y = ops.tanh(self.fc(x))
        return y + self.other(x) if self.extra else y


class Branching(Model):
    """Four blocks, of which forward may leave some out."""

    def __init__(self) -> None:
        self.layers = nn.ModuleList([Branch() for _ in range(4)])
        self.blocks = list(self.layers)
        self.skipped: set[int] = set()
        self.loss = nn.CrossEntropyLoss(reduction="sum")

    def forward(self, x: Any) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i not in self.skipped:
                x = block(x)
        return x


def configure(model: Branching, rank: int) -> Branching:
    model.skipped = [set(), {1, 2}, {3, 0}][rank]
    for i, block in enumerate(model.layers):
        block.extra = (i + rank) % 2 == 0
    return model


def train_branching(comm: Communicator, stage: int, prefetch: bool) -> None:
    """One step of three ranks that each leave out other blocks and parameters equals their serial sum.

    A parameter that no rank uses has no gradient and does not change, not even by weight decay.
    """
    rng = np.random.default_rng(0)
    shares = [(rng.standard_normal((n, 6)), rng.integers(0, 6, n)) for n in (3, 2, 4)]
    plain = Branching().materialize(SEED, "float64")
    for rank, (inputs, targets) in enumerate(shares):
        configure(plain, rank)
        plain.loss(plain(Tensor(inputs)), targets).backward()
    expected, before = gradients(plain), plain.state_dict()
    model = configure(Branching(), comm.rank)
    zero = Zero(model, comm, stage, prefetch=prefetch).materialize(SEED, "float64")
    update = OPTIMIZERS["sgd"]([t for _, t in zero.shards()])
    loss_of(zero, *shares[comm.rank]).backward()
    found = zero.full("grad")
    assert found.keys() == expected.keys()
    for name, g in found.items():
        np.testing.assert_allclose(g, expected[name], rtol=1e-10, atol=1e-13, err_msg=name)
    zero.step(update)
    for name, value in zero.full().items():
        assert np.array_equal(value, before[name]) == (name not in expected), name
