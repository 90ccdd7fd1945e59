"""What data parallelism sends: how much, in which order, and when; and parameters that no rank, or not every
rank, has used."""

import numpy as np
import pytest

from minipar import Tensor, launch, nn, ops, optim, random, world
from minipar.nn import BatchNorm2d
from minipar.parallel import DataParallel
from tests.parallel.training_runs import (
    SEED,
    assert_replicas_bitwise,
    batches,
    build,
    gradients,
    loss_sum,
    on_threads,
)

BUCKETS_MB = (1e-9, 0.0005, 100.0)


def backward(model: nn.Module, kind: str) -> None:
    inputs, targets = batches(kind, steps=1)[0]
    with random.at(seed=SEED, step=0, first_sample=0):
        (loss_sum(model, inputs, targets) / targets.size).backward()


# The formulas: B buckets of Ψ elements in all and P parameters --------------------------------------


@pytest.mark.parametrize("overlap", (True, False))
@pytest.mark.parametrize("bucket_mb", BUCKETS_MB)
def test_one_all_reduce_a_bucket_and_nothing_else(bucket_mb: float, overlap: bool) -> None:
    """B calls of Ψ + P elements: each parameter's values, and its flag."""

    def program() -> None:
        comm, model = world(), build("gpt-tied")
        parallel = DataParallel(model, comm, bucket_mb=bucket_mb, overlap=overlap)
        params = list(model.parameters())
        elements = sum(p.size for p in params) + len(params)
        comm.ledger.reset()
        for step in (1, 2):
            model.zero_grad()
            backward(model, "gpt-tied")
            parallel.step(optim.SGD(params, lr=0.1))
            expected = (step * len(parallel.buckets), step * elements, step * elements * 8)
            assert comm.ledger.as_dict() == {("all_reduce", "world"): expected}

    launch(program, 3)


@pytest.mark.parametrize("bucket_mb", BUCKETS_MB)
def test_at_the_start_one_broadcast_a_bucket(bucket_mb: float) -> None:
    def program() -> None:
        comm, model = world(), build("mlp")
        parallel = DataParallel(model, comm, bucket_mb=bucket_mb)
        size = sum(p.size for p in model.parameters())
        count = len(parallel.buckets)
        assert comm.ledger.as_dict() == {
            ("symmetric", "world"): (count, 0, 0),
            ("broadcast", "world"): (count, size, size * 8),
        }

    launch(program, 2)


def test_a_master_takes_one_reduce_and_one_broadcast_a_bucket() -> None:
    def program() -> None:
        comm, model = world(), build("mlp")
        parallel = DataParallel(model, comm, bucket_mb=0.0005, aggregation="master")
        params, buckets = list(model.parameters()), len(parallel.buckets)
        size = sum(p.size for p in params)
        comm.ledger.reset()
        backward(model, "mlp")
        parallel.step(optim.SGD(params, lr=0.1))
        assert comm.ledger.as_dict() == {
            ("reduce", "world"): (buckets, size + len(params), (size + len(params)) * 8),
            ("broadcast", "world"): (buckets, size, size * 8),
        }

    launch(program, 3)


def test_batch_norm_adds_its_sums_in_a_group_of_its_own() -> None:
    def program() -> None:
        comm, model = world(), build("convnet-batch-norm")
        parallel = DataParallel(model, comm)
        norms = sum(isinstance(module, BatchNorm2d) for _, module in model.named_modules())
        comm.ledger.reset()
        backward(model, "convnet")
        assert comm.ledger.calls("all_reduce", "world") == len(parallel.buckets)
        assert comm.ledger.calls("all_reduce") == len(parallel.buckets) + batch_norm_calls * norms

    batch_norm_calls = 3  # forward: the mean, the variance; backward: both sums at once
    launch(program, 2)


@pytest.mark.parametrize("microbatches", (1, 2, 4))
def test_microbatches_are_synchronised_once(microbatches: int) -> None:
    def program() -> None:
        comm, model = world(), build("mlp")
        parallel = DataParallel(model, comm, bucket_mb=0.0005)
        comm.ledger.reset()
        with parallel.no_sync():
            for _ in range(microbatches - 1):
                backward(model, "mlp")
        assert comm.ledger.calls() == 0
        backward(model, "mlp")
        assert comm.ledger.calls("all_reduce") == comm.ledger.calls() == len(parallel.buckets)

    launch(program, 2)


# Order and time --------------------------------------------------------------------------------------


def test_buckets_leave_in_one_order_on_every_rank() -> None:
    """Also where ranks reach their gradients in different orders, so that late buckets fill up first."""

    def program() -> list[tuple[int, ...]]:
        comm = world()
        model = nn.ModuleList([nn.Linear(n, n, bias=False) for n in (2, 3, 4)]).materialize(0, "float64")
        DataParallel(model, comm, bucket_mb=1e-9)
        layers = list(model) if comm.rank == 0 else list(model)[::-1]
        total = None
        for layer in layers:  # the last one used is the first to get its gradient
            y = ops.sum(layer(Tensor(np.ones((1, layer.weight.shape[1])))))
            total = y if total is None else total + y
        total.backward()
        calls = [c for c in comm.journal.entries if c.operation == "all_reduce"]
        for p in model.parameters():
            assert np.allclose(p.grad, comm.size)
        return [c.shape for c in calls]

    assert launch(program, 3) == [[(4 * 4 + 1,), (3 * 3 + 1,), (2 * 2 + 1,)]] * 3


@pytest.mark.parametrize("ranks", (1, 3))
@pytest.mark.parametrize("overlap", (True, False))
def test_the_first_bucket_is_sent_before_backward_has_finished(overlap: bool, ranks: int) -> None:
    def program() -> tuple[list[int], int]:
        comm, model = world(), build("gpt-untied")
        parallel = DataParallel(model, comm, bucket_mb=0.0005, overlap=overlap)
        sent_at: list[int] = []
        for p in parallel.params:  # after the wrapper's own hook
            p.register_hook(lambda p: sent_at.append(comm.ledger.calls("all_reduce")))
        comm.ledger.reset()
        backward(model, "gpt-untied")
        return sent_at, len(parallel.buckets)

    for sent_at, buckets in launch(program, ranks):
        assert buckets > 3
        if overlap:
            assert sent_at == sorted(sent_at)
            assert sent_at[len(sent_at) // 2] >= 1 and sent_at[-1] == buckets
        else:
            assert set(sent_at) == {0}


def test_a_tied_weight_is_sent_after_its_last_use() -> None:
    """Its gradient has two parts, and the embedding's comes last of all."""

    def program() -> None:
        comm, model = world(), build("gpt-tied")
        DataParallel(model, comm, bucket_mb=1e-9)
        seen: list[int] = []
        model.wte.weight.register_hook(lambda p: seen.append(comm.ledger.calls("all_reduce")))
        comm.ledger.reset()
        backward(model, "gpt-tied")
        assert len(seen) == 1 and comm.ledger.calls("all_reduce") >= seen[0] > 0

    launch(program, 2)


# Unused parameters ------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Three layers, of which a call uses those it is told to."""

    def __init__(self) -> None:
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])

    def forward(self, x: Tensor, used: tuple[int, ...]) -> Tensor:
        for i in used:
            x = self.layers[i](x)
        return ops.sum(x * x)


USES = {
    "some ranks": ((0, 1), (1,), (1, 0)),
    "no rank": ((1,), (1,), (1,)),
    "one rank": ((0, 1, 2), (1,), (1,)),
}


def updates(model: nn.Module) -> optim.Optimizer:
    return optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)


@pytest.mark.parametrize("options", ({}, {"overlap": False}, {"bucket_mb": 1e-9}, {"aggregation": "master"}))
@pytest.mark.parametrize("used", USES)
def test_a_parameter_that_is_unused_on(used: str, options: dict[str, object]) -> None:
    """As the serial run: summed where any rank used it; else None, so that weight decay leaves it alone."""
    inputs = np.random.default_rng(0).standard_normal((3, 2, 3))

    alone = Branches().materialize(0, "float64")
    serial, expected = updates(alone), []
    for _ in range(3):
        alone.zero_grad()
        total = sum((alone(Tensor(x), uses) for x, uses in zip(inputs, USES[used])), Tensor(np.zeros(())))
        total.backward()
        expected.append(gradients(alone))
        serial.step()

    def program() -> dict[str, np.ndarray]:
        comm, model = world(), Branches().materialize(0, "float64")
        parallel, optimizer = DataParallel(model, comm, **options), updates(model)
        for step in range(3):
            model.zero_grad()
            parallel(Tensor(inputs[comm.rank]), USES[used][comm.rank]).backward()
            if comm.rank == 0 or "aggregation" not in options:
                found = gradients(model)
                assert found.keys() == expected[step].keys()
                assert all(np.allclose(found[name], expected[step][name], rtol=1e-12) for name in found)
            parallel.step(optimizer)
        return model.state_dict()

    for state in launch(program, 3, timeout=20):
        for name, value in alone.state_dict().items():
            assert np.allclose(state[name], value, rtol=1e-9), name


def test_a_rank_without_any_gradient_synchronises_by_hand() -> None:
    def program() -> np.ndarray:
        comm, model = world(), nn.Linear(2, 1).materialize(0, "float64")
        parallel = DataParallel(model, comm)
        if comm.rank == 1:
            parallel.synchronize()
        else:
            ops.sum(parallel(Tensor(np.ones((1, 2))))).backward()
        return model.weight.grad

    assert all(np.array_equal(g, [[2.0, 2.0]]) for g in launch(program, 3, timeout=20))


def test_more_ranks_than_samples() -> None:
    """Nine ranks share seven samples: the idle ones run an empty forward and backward."""
    of_ranks = on_threads(9, "convnet-batch-norm", steps=2)
    assert_replicas_bitwise(of_ranks)
