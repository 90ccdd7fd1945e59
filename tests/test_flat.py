"""Parameters laid flat for the optimizer: the same steps bit by bit, gradients in one array, versions that count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minipar import ops, optim
from minipar.amp import autocast
from minipar.errors import UsageError
from minipar.flat import FlatTensor
from minipar.kernels.gpu_graph import Capture, capturing
from minipar.models import GPT, GPTConfig
from minipar.nn import Linear
from minipar.tensor import Tensor

IDS = np.random.default_rng(0).integers(0, 11, (2, 7))


def model_of() -> Any:
    return GPT(GPTConfig(11, 6, 8, 1, 2)).materialize(seed=0)


def train(model: Any, optimizer: optim.Optimizer, steps: int = 3, clip: Callable[[], Any] = lambda: None) -> list[Any]:
    for _ in range(steps):
        model.zero_grad()
        (model.loss(model(IDS[:, :-1]), IDS[:, 1:]) / 12).backward()
        clip()
        optimizer.step()
    return [p.data.copy() for p in model.parameters()]


@pytest.mark.parametrize("kind", (optim.AdamW, optim.Adam, optim.SGD))
def test_steps_are_bitwise_those_of_the_parameters_one_by_one(kind: Any) -> None:
    one, flat = model_of(), model_of()
    want = train(one, kind(one.parameters(), lr=1e-2, weight_decay=0.1))
    tensor = FlatTensor(flat.parameters())
    optimizer = kind([tensor], lr=1e-2, weight_decay=0.1)
    got = train(flat, optimizer)
    assert all(np.array_equal(a, b) for a, b in zip(got, want))
    assert tensor.shape == (sum(p.size for p in flat.parameters()),)
    assert all(p.grad.base is not None and np.shares_memory(p.grad, tensor.grad) for p in flat.parameters())


def test_clipping_and_scaling_reach_the_parameters_either_way() -> None:
    one, flat = model_of(), model_of()
    want = train(one, optim.SGD(one.parameters(), lr=0.1), clip=lambda: optim.clip_grad_norm_(one.parameters(), 0.1))
    tensor = FlatTensor(flat.parameters())
    got = train(flat, optim.SGD([tensor], lr=0.1), clip=lambda: optim.clip_grad_norm_([tensor], 0.1))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-8)  # the norm is added up in another order


def test_a_gradient_from_elsewhere_is_taken_over() -> None:
    layer = Linear(2, 3).materialize(seed=0)
    tensor = FlatTensor(layer.parameters())
    assert tensor.grad is None
    layer.weight.grad, layer.bias.grad = np.full((3, 2), 2.0, "f4"), np.ones(3, "f4")
    assert tensor.grad.tolist() == [2.0] * 6 + [1.0] * 3
    tensor.grad *= 0.5
    assert layer.weight.grad[0, 0] == 1 and layer.bias.grad[0] == 0.5
    layer.bias.grad_buffer = layer.bias.grad = np.full(3, 7.0, "f4")  # as data parallelism's buckets do
    assert tensor.grad.tolist() == [1.0] * 6 + [7.0] * 3
    tensor.grad = np.arange(9, dtype="f4")
    assert layer.bias.grad.tolist() == [6, 7, 8]
    tensor.grad = None
    assert layer.weight.grad is None


def test_a_step_changes_every_member_s_version() -> None:
    layer = Linear(2, 3).materialize(seed=0)
    optimizer = optim.SGD([FlatTensor(layer.parameters())], lr=0.1)
    x, casting = np.ones((4, 2), np.float32), autocast("float16")
    with casting:
        before = layer(Tensor(x))
    layer.weight.grad, layer.bias.grad = np.ones((3, 2), "f4"), np.ones(3, "f4")
    versions = [p.version for p in layer.parameters()]
    optimizer.step()
    assert [p.version for p in layer.parameters()] == [v + 1 for v in versions]
    with casting:
        assert not np.allclose(layer(Tensor(x)).data, before.data), "a stale copy of the weights"


def test_what_cannot_be_laid_flat_is_refused() -> None:
    layer = Linear(2, 3).materialize(seed=0)
    tensor = FlatTensor(layer.parameters())
    layer.weight.grad = np.ones((3, 2), "f4")
    with pytest.raises(UsageError, match="1 of 2 parameters have no gradient, the first is bias"):
        optim.SGD([tensor]).step()
    with pytest.raises(UsageError, match="its place already"):
        FlatTensor(layer.parameters())
    with pytest.raises(UsageError, match="no parameters"):
        FlatTensor([])
    with pytest.raises(UsageError, match="listed twice"):
        FlatTensor([Tensor(np.ones(2))] * 2)
    with pytest.raises(UsageError, match="float32 in numpy, float64 in numpy"):
        FlatTensor([Tensor(np.ones(2)), Tensor(np.ones(2, np.float32))])


# What a captured graph needs of optimizers and of autocast, without a GPU ------------------------------


def test_a_capturable_step_is_the_same_and_is_saved_the_same() -> None:
    one, other = model_of(), model_of()
    plain, capturable = (optim.AdamW(m.parameters(), lr=1e-2, capturable=c) for m, c in ((one, False), (other, True)))
    for lr in (1e-2, 3e-3):
        plain.set_lr(lr)
        capturable.set_lr(lr)
        for a, b in zip(train(one, plain, 2), train(other, capturable, 2)):
            assert np.array_equal(a, b)
    saved = capturable.state_dict()
    assert saved["state"][0]["step"] == plain.state_dict()["state"][0]["step"] == 4
    capturable.load_state_dict(saved)
    assert np.array_equal(train(other, capturable, 1)[0], train(one, plain, 1)[0])


def test_a_capturable_step_takes_a_loaded_learning_rate() -> None:
    one, other = model_of(), model_of()
    first, second = (optim.AdamW(m.parameters(), lr=0.1, capturable=True) for m in (one, other))
    train(one, first, 1)
    train(other, second, 1)
    saved = first.state_dict()
    saved["groups"][0]["lr"] = 1e-3
    second.load_state_dict(saved)
    first.set_lr(1e-3)
    assert np.array_equal(train(one, first, 1)[0], train(other, second, 1)[0])


def test_in_a_captured_graph_versions_are_counted_at_each_replay() -> None:
    layer = Linear(2, 3).materialize(seed=0)
    layer.weight.grad, layer.bias.grad = np.ones((3, 2), "f4"), np.ones(3, "f4")
    graph = Capture()
    token = capturing.set(graph)
    try:
        with pytest.raises(UsageError, match="SGD: in a captured graph the learning rate"):
            optim.SGD(layer.parameters()).step()
        optim.AdamW(layer.parameters(), capturable=True).step()
    finally:
        capturing.reset(token)
    version = layer.weight.version
    for repeat in graph.at_replay:
        repeat()
    assert layer.weight.version == version + 1


def test_a_captured_graph_has_its_own_copies_of_weights() -> None:
    """With earlier ones replays would go on with the weights as they were; its own mean nothing outside."""
    layer, casting = Linear(2, 3).materialize(seed=0), autocast("float16")
    x = Tensor(np.ones((4, 2), np.float32))
    made: list[Any] = []
    copy_of = casting.copy_of
    casting.copy_of = lambda t, dtype: made.append(copy_of(t, dtype)) or made[-1]  # type: ignore[method-assign]

    def copies() -> list[int]:
        made.clear()
        with casting:
            loss = ops.sum(layer(x))
        loss.backward()
        return [id(a) for a in made if a.shape == (3, 2)]

    outside = copies()
    kept = list(made)
    assert len(set(outside)) == 1 and copies() == outside, "kept, also for backward"
    token = capturing.set(Capture())
    try:
        inside = copies()
        kept += made
    finally:
        capturing.reset(token)
    assert len(set(inside)) == 1 and not set(inside) & set(outside)
    assert not set(copies()) & set(inside)
    del kept
