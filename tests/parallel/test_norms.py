"""The gradient norm equals the serial one under any layout: every element counted once."""

from __future__ import annotations

import numpy as np
import pytest

from minipar import Tensor, launch, optim, world
from minipar.nn import Linear
from minipar.parallel.norms import global_norm
from minipar.parallel.tensor_parallel.parallelize import parallelize
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.parallel.tensor_parallel.styles import Column
from tests.parallel.tensor_runs import MODELS, SEED, batch, loss_of


@pytest.mark.parametrize("kind", ["gpt-tied", "gpt-untied", "mlp-3", "convnet"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_norm_counts_each_element_once(kind: str, ranks: int) -> None:
    kind = "gpt-3-heads" if kind.startswith("gpt") and ranks == 3 else kind
    model = MODELS[kind]().materialize(SEED, "float64")
    x, targets = batch(kind, 0)
    loss_of(model, x, targets).backward()
    expected = np.sqrt(sum((p.grad**2).sum() for p in model.parameters()))

    def run() -> tuple[float, dict]:
        model = MODELS[kind]()
        parallelize(model, world(), default_plan(model)).materialize(SEED, "float64")
        loss_of(model, x, targets).backward()
        world().ledger.reset()
        norm = global_norm([(p, p) for p in model.parameters()], shard_comm=None, tp=world())
        return norm, world().ledger.as_dict()

    results = launch(run, ranks)
    assert len({norm for norm, _ in results}) == 1
    assert abs(results[0][0] - expected) <= 1e-12 * expected
    assert all(found == {("all_reduce", "world"): (1, 1, 8)} for _, found in results)


def test_norm_of_shards_and_of_missing_gradients() -> None:
    """ZeRO's flat shards over 2 ranks, each of a parameter cut over 2 others; squares add in float64."""
    serial_gradient = np.full(10, 1e-3, "float32")
    serial_gradient[0] = 1e4

    def run() -> float:
        comm = world()
        shards, tp = comm.split(comm.rank // 2), comm.split(comm.rank % 2)
        layer = Linear(5, 2)
        parallelize(layer, tp, {"": Column()}).materialize(0)  # weight (1, 5) a rank, bias (1,)
        local = serial_gradient[5 * tp.rank : 5 * tp.rank + 5]
        shard = Tensor(np.zeros(0, "float32"))
        shard.grad = np.array_split(local, 2)[shards.rank]
        return global_norm([(layer.weight, shard), (layer.bias, layer.bias)], shard_comm=shards, tp=tp)

    results = launch(run, 4)
    assert len(set(results)) == 1
    wide = serial_gradient.astype("float64")
    assert abs(results[0] - np.sqrt(wide @ wide)) < 1e-9 * results[0]
    assert global_norm([(Linear(2, 2).weight, Tensor(np.ones(2)))], shard_comm=None, tp=None) == 0.0


def test_norm_of_an_overflow_is_seen_by_all() -> None:
    def run() -> None:
        p = Linear(2, 2).materialize(0).weight
        p.grad = np.full((2, 2), np.inf if world().rank == 1 else 1.0, "float32")
        norm = global_norm([(p, p)], shard_comm=world(), tp=None)
        with pytest.raises(FloatingPointError):
            optim.clip_grad_norm_([p], 1.0, norm)

    launch(run, 3)
