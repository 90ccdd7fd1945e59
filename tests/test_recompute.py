"""Recomputation: bitwise the same, dropout and statistics included; less held; hooks once; refusals."""

import weakref

import numpy as np
import pytest

from minipar import nn, ops, random
from minipar.models import GPT, ConvNet, ConvNetConfig, GPTConfig
from minipar.recompute import recompute
from minipar.tape import no_grad, run_deferred
from minipar.tensor import Tensor

CONFIG = GPTConfig(vocab=11, seq_len=8, width=16, layers=3, heads=2, dropout=0.3)
IDS = np.arange(16).reshape(2, 8) % 11


def run(model, wrap, deferred=None):
    """Return (loss, gradients) with every block called through `wrap`."""
    model.zero_grad()
    with random.at(seed=5, step=2):
        h = IDS
        for block in model.blocks:
            h = wrap(block, h)
        loss = model.loss(h, (IDS + 1) % 11)
    loss.backward(deferred=deferred)  # outside: the replay must remember where it was
    if deferred is not None:
        run_deferred(deferred)
    return loss.data.copy(), {n: p.grad for n, p in model.named_parameters()}


def call(block, h):
    return block(h)


@pytest.mark.parametrize("later", [False, True], ids=["at once", "deferred"])
def test_bitwise_equal_with_dropout(later):
    model = GPT(CONFIG).materialize(0, "float64")
    loss, grads = run(model, call)
    again, recomputed = run(model, recompute, [] if later else None)
    assert loss == again
    for name, g in grads.items():
        np.testing.assert_array_equal(recomputed[name], g, err_msg=name)


def test_nested_recomputation():
    class Outer(nn.Module):
        def __init__(self, blocks):
            self.inner = nn.ModuleList(blocks)

        def forward(self, x):
            for block in self.inner:
                x = recompute(block, x)
            return x

    outer = Outer([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]).materialize(0, "float64")
    x = Tensor(np.random.default_rng(0).standard_normal((2, 4)), requires_grad=True)
    expected = x
    for block in outer.inner:
        expected = block(expected)
    (expected * expected).sum().backward()
    grads = [x.grad, *(p.grad for p in outer.parameters())]
    x.grad = None
    outer.zero_grad()
    y = recompute(outer, x)
    (y * y).sum().backward()
    for a, b in zip(grads, [x.grad, *(p.grad for p in outer.parameters())]):
        np.testing.assert_array_equal(a, b)


def test_activations_are_not_held():
    class Watched(nn.Module):
        def __init__(self):
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            h = ops.tanh(self.fc(x))
            made.append(weakref.ref(h.data))
            return h * h

    for wrap, held in ((call, 4), (recompute, 0)):
        made: list[weakref.ref] = []
        model = nn.ModuleList([Watched() for _ in range(4)]).materialize(0)
        h = Tensor(np.ones((16, 8), np.float32), requires_grad=True)
        for block in model:
            h = wrap(block, h)
        assert sum(ref() is not None for ref in made) == held
        h.sum().backward()
        assert not any(ref() is not None for ref in made)


def test_a_weight_in_two_recomputed_blocks_fires_its_hooks_once():
    shared = nn.Linear(4, 4)
    blocks = [nn.Sequential(shared, nn.Tanh()), nn.Sequential(nn.Tanh(), shared)]
    nn.ModuleList(blocks).materialize(0, "float64")
    x = Tensor(np.random.default_rng(0).standard_normal((3, 4)), requires_grad=True)
    fired = []
    shared.weight.register_hook(lambda p: fired.append(p.grad.copy()))
    blocks[1](blocks[0](x)).sum().backward()
    ordinary, shared.weight.grad = shared.weight.grad, None
    fired.clear()
    recompute(blocks[1], recompute(blocks[0], x)).sum().backward()
    assert len(fired) == 1
    np.testing.assert_array_equal(fired[0], ordinary)


def test_microbatches_in_flight_fire_hooks_once_each():
    shared = nn.Linear(4, 4).materialize(0, "float64")
    x, fired = Tensor(np.ones((3, 4))), []
    shared.weight.register_hook(lambda p: fired.append(1))
    losses = [recompute(shared, recompute(shared, x)).sum() for _ in range(2)]
    for loss in losses:  # the first backward must not cut the second graph off from its leaves
        loss.backward()
    assert fired == [1, 1]


def test_running_statistics_count_each_batch_once():
    x = np.random.default_rng(0).standard_normal((4, 2, 8, 8))
    buffers = []
    for wrap in (call, recompute):
        model = ConvNet(ConvNetConfig(channels=2, size=8, classes=3, width=4, layers=2, norm="batch"))
        model.materialize(0, "float64")
        h = Tensor(x)
        for block in model.blocks:
            h = wrap(block, h)
        model.loss(h, np.array([0, 1, 2, 0])).backward()
        buffers.append({n: b.data for n, b in model.named_buffers()})
    assert buffers[0]["stem.norm.running_mean"].any()
    for name, b in buffers[0].items():
        np.testing.assert_array_equal(buffers[1][name], b, err_msg=name)


def test_no_grad_records_nothing_and_inputs_get_their_gradients():
    layer = nn.Linear(4, 4).materialize(0)
    x = Tensor(np.ones((2, 4), np.float32), requires_grad=True)
    with no_grad():
        assert recompute(layer, x).is_leaf
    for p in layer.parameters():
        p.requires_grad = False
    recompute(layer, x).sum().backward()
    np.testing.assert_allclose(x.grad, np.tile(layer.weight.data.sum(0), (2, 1)), rtol=1e-6)
    assert layer.weight.grad is None


def test_a_weight_changed_before_the_replay_raises():
    layer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).materialize(0)
    loss = recompute(layer, Tensor(np.ones((2, 4), np.float32))).sum()
    layer[1].weight.assign_(2.0)
    with pytest.raises(RuntimeError, match=r"parameter of shape \(4,\) was changed in place"):
        loss.backward()
    assert all(p.grad is None for p in layer.parameters())
