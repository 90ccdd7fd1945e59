"""Hooks on leaves, and weight gradients that are put off."""

import numpy as np
import pytest

from minipar import ops
from minipar.tape import run_deferred, running_backward
from minipar.tensor import Tensor, primitive, tensor
from tests.op_checks import leaf, weight

# ---- hooks --------------------------------------------------------------------------------------------


def test_hooks_fire_once_after_the_last_use():
    w, fired = leaf(3, 3), []
    remove = w.register_hook(lambda p: fired.append(p.grad.copy()))
    x = Tensor(np.ones((2, 3)))
    ops.linear(ops.linear(x, w), w).sum().backward()
    assert len(fired) == 1
    np.testing.assert_array_equal(fired[0], w.grad)
    (w * 1.0).sum().backward()
    assert len(fired) == 2
    remove()
    (w * 1.0).sum().backward()
    assert len(fired) == 2


def test_the_last_layer_s_hook_fires_before_the_first_layer_s_backward():
    events = []

    @primitive
    def layer(x, w, name):
        return x * w, lambda g: (events.append(f"backward {name}"), (g * w, g * x, None))[1]

    weights = [leaf(3, seed=i) for i in range(3)]
    h = Tensor(np.ones(3))
    for i, w in enumerate(weights):
        w.register_hook(lambda p, i=i: events.append(f"hook {i}"))
        h = layer(h, w, i)
    h.sum().backward()
    assert events == ["backward 2", "hook 2", "backward 1", "hook 1", "backward 0", "hook 0"]


def test_at_end_runs_after_all_hooks_and_inside_the_run():
    a, b, events = leaf(2), leaf(2), []

    def hook(p):
        if not events:
            running_backward().at_end.append(lambda: events.append(("end", running_backward() is not None)))
        events.append("hook")

    a.register_hook(hook), b.register_hook(hook)
    (a * b).sum().backward()
    assert events == ["hook", "hook", ("end", True)]
    with pytest.raises(RuntimeError, match="no backward is running"):
        running_backward()


def test_hooks_belong_to_leaves():
    with pytest.raises(RuntimeError, match="hooks belong to leaves"):
        (leaf(2) * 1.0).register_hook(print)


# ---- deferred weight gradients ------------------------------------------------------------------------


def network(weights, x):
    h = ops.linear(x, weights[0])  # the first operation on x is itself a linear layer
    return ops.linear(ops.tanh(h) * weights[2], weights[1]).sum()


def test_deferred_weight_gradients_equal_ordinary_ones():
    weights = [weight(4, 3), weight(3, 4), weight(4)]
    x = leaf(5, 3)
    network(weights, x).backward()
    expected = [w.grad for w in (*weights, x)]
    for t in (*weights, x):
        t.grad = None
    deferred = []
    network(weights, x).backward(deferred=deferred)
    np.testing.assert_array_equal(x.grad, expected[3])  # the input's gradient is never put off
    assert [w.grad for w in weights] == [None] * 3 and len(deferred) == 3
    run_deferred(deferred)
    assert deferred == []
    for w, g in zip(weights, expected):
        np.testing.assert_array_equal(w.grad, g)


def test_hooks_fire_after_the_last_deferred_thunk_of_several_microbatches():
    w, x, fired = weight(3, 3), leaf(2, 3), []
    w.register_hook(lambda p: fired.append(p.grad.copy()))
    losses = [ops.linear(ops.linear(x, w), w).sum() * float(i) for i in (1, 2)]
    lists = [[], []]
    for loss, deferred in zip(losses, lists):
        loss.backward(deferred=deferred)
    run_deferred(lists[0])
    assert fired == [] and w.grad is None
    run_deferred(lists[1])
    assert len(fired) == 1
    expected = tensor(w, requires_grad=True)
    (ops.linear(ops.linear(x, expected), expected).sum() * 3.0).backward()
    np.testing.assert_allclose(fired[0], expected.grad, rtol=1e-12)


@pytest.mark.parametrize("put_off", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_weights_first_gradient_is_computed_in_its_buffer(dtype, put_off, monkeypatch):
    places, kernels = [], ops.linalg.kernels.of(np.zeros(1))
    product = kernels.linear_backward_weight
    monkeypatch.setattr(
        kernels, "linear_backward_weight", lambda g, x, out: (places.append(out), product(g, x, out))[1]
    )
    w, x = weight(3, 3), leaf(2, 3)
    serial = tensor(w, requires_grad=True)

    def two_steps(model):
        for _ in range(2):
            deferred = []
            ops.linear(ops.linear(x, model), model).sum().backward(deferred=deferred if put_off else None)
            run_deferred(deferred)
        return model.grad

    w.grad_buffer = np.full((3, 3), np.nan, dtype)
    assert two_steps(w) is w.grad_buffer
    # Only the very first: the others are added to it. None where it would have to be rounded on its way.
    assert [out is w.grad_buffer for out in places] == [dtype == "float64", False, False, False]
    assert [out for out in places if out is not w.grad_buffer] == [None] * (3 + (dtype == "float32"))
    np.testing.assert_allclose(w.grad, two_steps(serial), rtol=4 * np.finfo(dtype).eps)


def test_hooks_can_reach_the_run_when_weights_are_deferred():
    w, events, deferred = weight(3, 3), [], []
    w.register_hook(lambda p: running_backward().at_end.append(lambda: events.append("end")))
    ops.linear(Tensor(np.ones((2, 3))), w).sum().backward(deferred=deferred)
    assert events == []
    run_deferred(deferred)
    assert events == ["end"]


def test_microbatches_in_flight_share_one_leaf_and_fire_once_each():
    w, fired = weight(2, 2), []
    w.register_hook(lambda p: fired.append(1))
    x = Tensor(np.ones((1, 2)))
    first, second = ops.linear(x, w).sum(), ops.linear(x, w).sum()
    first.backward()
    late = ops.linear(ops.linear(x, w), w).sum()
    second.backward(), late.backward()
    assert fired == [1, 1, 1]
