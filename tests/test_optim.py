"""Optimizers, clipping, the schedule: formulas by hand, determinism, state, refusals."""

import math

import numpy as np
import pytest

from minipar.errors import UsageError
from minipar.optim import SGD, Adam, AdamW, clip_grad_norm_, warmup_cosine
from minipar.tensor import Tensor

MAKERS = [
    lambda ps: SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    lambda ps: Adam(ps, lr=0.01, weight_decay=0.1),
    lambda ps: AdamW(ps, lr=0.01),
]


def parameters(dtype="float64"):
    rng = np.random.default_rng(0)
    return [Tensor(rng.standard_normal(s).astype(dtype), requires_grad=True) for s in ((3, 4), (5,), ())]


def train(optimizer, tensors, first, last):
    for step in range(first, last):
        rng = np.random.default_rng(step)
        for t in tensors:
            t.grad = np.asarray(rng.standard_normal(t.shape), t.dtype)
        optimizer.step()


def test_sgd_by_hand():
    t = Tensor(np.array([1.0, -2.0]), requires_grad=True)
    optimizer = SGD([t], lr=0.1, momentum=0.5, weight_decay=0.2, dampening=0.25)
    value, velocity = t.data.copy(), None
    for g in (np.array([1.0, 2.0]), np.array([-3.0, 0.5])):
        t.grad = g
        optimizer.step()
        g = g + 0.2 * value
        velocity = g if velocity is None else 0.5 * velocity + 0.75 * g
        value = value - 0.1 * velocity
        np.testing.assert_allclose(t.data, value, rtol=1e-14)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_by_hand(decoupled):
    t = Tensor(np.array([1.0, -2.0]), requires_grad=True)
    optimizer = (AdamW if decoupled else Adam)([t], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    w, m, v = t.data.copy(), 0, 0
    for step, g in enumerate((np.array([1.0, 2.0]), np.array([-3.0, 0.5]), np.array([0.0, 1.0])), 1):
        t.grad = g.copy()
        optimizer.step()
        if decoupled:
            w = w * (1 - 0.1 * 0.2)
        else:
            g = g + 0.2 * w
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - 0.1 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-3)
        np.testing.assert_allclose(t.data, w, rtol=1e-12)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_are_bitwise_deterministic_and_in_place(make, dtype):
    runs = []
    for _ in range(2):
        tensors = parameters(dtype)
        memory = [t.data for t in tensors]
        versions = [t.version for t in tensors]
        optimizer = make(tensors)
        train(optimizer, tensors, 0, 5)
        assert all(t.data is m and t.dtype == dtype for t, m in zip(tensors, memory))
        assert all(t.version == v + 5 for t, v in zip(tensors, versions))
        runs.append([t.data for t in tensors])
    for a, b in zip(*runs):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", MAKERS)
def test_resuming_from_state_is_bitwise(make):
    straight = parameters()
    train(make(straight), straight, 0, 8)
    first = parameters()
    optimizer = make(first)
    train(optimizer, first, 0, 3)
    state = optimizer.state_dict()
    resumed = [Tensor(t.data.copy(), requires_grad=True) for t in first]
    train(optimizer, first, 3, 4)  # the saved state is a copy, not a view of what goes on
    fresh = make(resumed)
    fresh.load_state_dict(state)
    train(fresh, resumed, 3, 8)
    for a, b in zip(straight, resumed):
        np.testing.assert_array_equal(a.data, b.data)


def test_groups_and_learning_rate():
    a, b = parameters()[:2]
    optimizer = SGD([{"params": [a], "lr": 1.0}, {"params": [b]}], lr=0.5)
    before = a.data.copy(), b.data.copy()
    a.grad, b.grad = np.ones_like(a.data), np.ones_like(b.data)
    optimizer.step()
    np.testing.assert_allclose(a.data, before[0] - 1)
    np.testing.assert_allclose(b.data, before[1] - 0.5)
    optimizer.set_lr(0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
    optimizer.zero_grad()
    optimizer.step()  # no gradient, no change
    assert a.grad is None and b.grad is None
    np.testing.assert_allclose(b.data, before[1] - 0.5)


def test_gradients_are_left_as_they_are():
    for make in MAKERS:
        tensors = parameters()
        optimizer = make(tensors)
        train(optimizer, tensors, 0, 1)
        grads = [t.grad.copy() for t in tensors]
        optimizer.step()
        for t, g in zip(tensors, grads):
            np.testing.assert_array_equal(t.grad, g)


def test_clipping():
    tensors = parameters()
    for t in tensors:
        t.grad = np.full_like(t.data, 2.0)
    norm = math.sqrt(4 * 18)
    memory = [t.grad for t in tensors]
    assert clip_grad_norm_(iter(tensors), 1e3) == pytest.approx(norm)
    assert all((t.grad == 2).all() for t in tensors)
    assert clip_grad_norm_(tensors, 1.0) == pytest.approx(norm)
    assert math.sqrt(sum((t.grad**2).sum() for t in tensors)) == pytest.approx(1, rel=1e-5)
    assert all(t.grad is m for t, m in zip(tensors, memory))
    assert clip_grad_norm_(tensors, 0.1, norm=2.0) == 2.0  # the norm of all ranks, given from outside
    half = Tensor(np.ones(4, np.float16), requires_grad=True)
    half.grad = np.full(4, 60000, np.float16)
    assert clip_grad_norm_([half], 1.0) == pytest.approx(120000, rel=1e-2)
    large = Tensor(np.ones(2, "float32"))
    large.grad = np.full(2, 1e20, "float32")  # whose squares overflow float32
    assert clip_grad_norm_([large], 1.0) == pytest.approx(1e20 * 2**0.5)
    assert half.grad.dtype == np.float16
    tensors[0].grad[0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        clip_grad_norm_(tensors, 1.0)


def test_warmup_cosine():
    rate = lambda step: warmup_cosine(step, peak=2.0, warmup=4, total=12, floor=0.5)
    assert [rate(s) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0 and rate(8) == pytest.approx(1.25) and rate(12) == rate(100) == 0.5
    assert warmup_cosine(0, peak=1.0, warmup=0, total=0) == 1.0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda t: SGD([]), "SGD: no parameters to optimise"),
        (lambda t: SGD([t, t]), "SGD: a parameter is listed twice"),
        (lambda t: Adam([{"params": [t], "momentum": 1}]), "Adam: unknown option 'momentum'; known: .*betas"),
        (lambda t: SGD([t], nesterov=True), "Nesterov momentum needs momentum > 0"),
        (lambda t: SGD([t], momentum=0.9, dampening=0.1, nesterov=True), "Nesterov"),
        (lambda t: SGD([{"params": [t], "nesterov": True}]), "Nesterov"),
        (lambda t: SGD([t], lr=-1.0), "SGD: lr = -1.0 must not be negative"),
        (lambda t: AdamW([t], betas=(0.9, 1.0)), r"AdamW: betas \(0.9, 1.0\) must lie in \[0, 1\)"),
        (lambda t: AdamW([t], weight_decay=-0.1), "AdamW: weight_decay = -0.1"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(UsageError, match=message):
        wrong(parameters()[0])


def test_load_refusals_change_nothing():
    tensors = parameters()
    optimizer = Adam(tensors)
    train(optimizer, tensors, 0, 2)
    before = optimizer.state_dict()
    other = Adam(tensors[:2]).state_dict()
    with pytest.raises(UsageError, match="is for 2 parameters in 1 groups, this optimizer has 3 in 1"):
        optimizer.load_state_dict(other)
    with pytest.raises(UsageError, match=r"optimizer state has options .*momentum.*Adam has"):
        optimizer.load_state_dict(SGD(tensors).state_dict())
    bad = optimizer.state_dict()
    bad["state"][1]["exp_avg"] = np.zeros(3)
    with pytest.raises(UsageError, match=r"'exp_avg' of parameter 1 is \(3,\), the parameter is \(5,\)"):
        optimizer.load_state_dict(bad)
    for i, entry in optimizer.state_dict()["state"].items():
        for k, v in entry.items():
            np.testing.assert_array_equal(v, before["state"][i][k])
