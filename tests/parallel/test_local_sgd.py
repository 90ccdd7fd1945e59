"""Averaging parameters: equal to averaging gradients for one step of SGD, and not for Adam or more steps."""

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest

from minipar import launch, nn, optim, world
from minipar.config import TrainConfig
from minipar.errors import UsageError
from minipar.parallel import LocalSGD
from minipar.training import Job
from tests.parallel.training_runs import SEED, Arrays, batches, build, loss_sum, share, worst_error

KIND = "convnet"  # no dropout: its masks are not the point here


def plain_sgd(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.1)


def adam(model: nn.Module) -> optim.Optimizer:
    return optim.Adam(model.parameters(), lr=0.01)


def serial(optimizer: Callable[[nn.Module], optim.Optimizer], steps: int) -> Arrays:
    model = build(KIND)
    update = optimizer(model)
    for inputs, targets in batches(KIND, steps=steps):
        model.zero_grad()
        (loss_sum(model, inputs, targets) / len(targets)).backward()
        update.step()
    return model.state_dict()


def local(
    ranks: int, optimizer: Callable[[nn.Module], optim.Optimizer], steps: int, every: int = 1
) -> list[Arrays]:
    """Each rank divides its loss by its own number of targets, and steps alone."""

    def program() -> Arrays:
        comm, model = world(), build(KIND, seed=SEED + world().rank)
        wrapper, update = LocalSGD(model, comm, every, bucket_mb=0.0005), optimizer(model)
        for inputs, targets in batches(KIND, steps=steps):
            model.zero_grad()
            mine = share(len(targets), comm.rank, comm.size)
            count = len(targets[mine])
            (loss_sum(model, inputs[mine], targets[mine]) / max(count, 1)).backward()
            wrapper.step(update, count)
        return model.state_dict()

    return launch(program, ranks, timeout=20)


def difference(ours: Arrays, theirs: Arrays) -> float:
    return worst_error(ours, theirs, 1.0)[0]


@pytest.mark.parametrize("ranks", (1, 2, 3, 5))
def test_averaging_after_each_sgd_step_is_averaging_gradients(ranks: int) -> None:
    """Over ten steps, of shares that are unequal and, with five ranks and four samples, empty."""
    for state in local(ranks, plain_sgd, steps=10):
        assert difference(state, serial(plain_sgd, steps=10)) < 1e-10


def test_replicas_are_bitwise_equal_after_an_average_only() -> None:
    def equal(states: list[Arrays]) -> bool:
        return all(s[n].tobytes() == states[0][n].tobytes() for s in states for n in states[0])

    assert equal(local(3, plain_sgd, steps=4, every=2))
    assert not equal(local(3, plain_sgd, steps=3, every=2))


@pytest.mark.parametrize(("optimizer", "every"), [(adam, 1), (plain_sgd, 2)])
def test_with_adam_or_more_steps_it_is_another_method(
    optimizer: Callable[[nn.Module], optim.Optimizer], every: int
) -> None:
    """A real difference, far above rounding."""
    state = local(3, optimizer, steps=2, every=every)[0]
    assert difference(state, serial(optimizer, steps=2)) > 1e-3


def test_one_message_every_so_many_steps() -> None:
    def program() -> None:
        comm, model = world(), build("mlp")
        wrapper, update = LocalSGD(model, comm, every=3), plain_sgd(model)
        elements = sum(p.size for p in model.parameters())
        comm.ledger.reset()
        for step in range(1, 7):
            wrapper.step(update, targets=2)
            averages = step // 3
            assert comm.ledger.calls("all_reduce") == averages * (len(wrapper.buckets) + 1)
            assert comm.ledger.elements("all_reduce") == averages * (elements + 1)

    launch(program, 2)


def test_what_is_judged_and_saved_is_one_model_between_averages_too() -> None:
    """Six steps, averaged after the fourth: evaluation comes when the ranks hold different weights."""

    def program() -> tuple[Arrays, Arrays, float]:
        config = TrainConfig(model="mlp", steps=6, batch=16, width=16, layers=2, aggregation="local", average_every=4)
        job = Job(config.resolved(), world())
        deque(job.train(), maxlen=0)
        apart = {name: value.copy() for name, value in job.strategy.tensors()}
        loss = job.evaluate()["loss"]
        job.strategy.finish_steps()  # nothing is left to do
        return apart, dict(job.strategy.tensors()), loss

    apart, together, losses = zip(*launch(program, 2, timeout=60))
    assert difference(apart[0], apart[1]) > 1e-4
    for name, weights in together[0].items():
        assert weights.tobytes() == together[1][name].tobytes()
        np.testing.assert_allclose(weights, (apart[0][name] + apart[1][name]) / 2, atol=1e-6)  # shares of 8 and 8
    assert losses[0] == losses[1]


def test_frozen_parameters_come_from_the_master_and_stay() -> None:
    def program() -> bytes:
        comm, model = world(), build("mlp", seed=world().rank)
        frozen = model.layers[0].fc.weight
        frozen.requires_grad = False
        wrapper, update = LocalSGD(model, comm), plain_sgd(model)
        for _ in range(3):
            wrapper.step(update, targets=1 + comm.rank)
        return frozen.data.tobytes()

    expected = build("mlp", seed=0).layers[0].fc.weight.data.tobytes()
    assert launch(program, 3) == [expected] * 3


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="averaged every 0 steps; give a number of at least 1"):
        LocalSGD(build("mlp"), world(), every=0)
    with pytest.raises(UsageError, match="batch norm would keep other statistics on every rank"):
        LocalSGD(build("convnet-batch-norm"), world())
