"""Tensors: what backward refuses, copies, printing."""

import copy

import numpy as np
import pytest

from minipar import ops
from minipar.nn import Linear
from minipar.tape import running_backward
from minipar.tensor import Tensor, primitive, tensor
from tests.op_checks import leaf

# ---- refusals -----------------------------------------------------------------------------------------


def test_a_second_backward_raises_and_changes_nothing():
    x = leaf(2)
    h = ops.exp(x)
    y = h.sum()
    y.backward()
    before = x.grad.copy()
    with pytest.raises(RuntimeError, match="graph of 'sum' was already used and freed; run forward again"):
        y.backward()
    with pytest.raises(RuntimeError, match="graph of 'exp' was already used"):
        (h * x).sum().backward()
    np.testing.assert_array_equal(x.grad, before)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: ops.linear(Tensor(np.ones((2, 3))), w),
        lambda w: ops.layer_norm(Tensor(np.ones((2, 3))), w[0]),
        lambda w: w * 2.0,
        lambda w: ops.embedding(w, np.array([1])),
    ],
)
def test_a_weight_changed_between_forward_and_backward_raises(use):
    w = leaf(3, 3)
    loss = use(w).sum()
    w.assign_(np.zeros((3, 3)))
    with pytest.raises(
        RuntimeError, match=r"shape \(3, 3\) was changed in place .*before the optimizer's step"
    ):
        loss.backward()
    assert w.grad is None
    use(
        w
    ).sum().backward()  # a forward after the change is as good as any, although the old graph still lives
    assert w.grad is not None


def test_a_frozen_weight_changed_between_forward_and_backward_raises():
    x, w = leaf(2, 3), Tensor(np.ones((3, 3)))
    y = ops.linear(x, w).sum()
    w.assign_(0.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_an_exception_in_a_vjp_leaves_no_half_filled_gradients():
    fail = [True]

    @primitive
    def moody(x):
        def vjp(g):
            if fail[0]:
                raise FloatingPointError("moody")
            return g

        return x + 0.0, vjp

    x = leaf(3)
    h = ops.exp(x)
    left, right = moody(h), h * 2.0
    with pytest.raises(FloatingPointError, match="moody"):
        (left + right).sum().backward()
    assert x.grad is None
    with pytest.raises(RuntimeError, match="no backward is running"):
        running_backward()
    fail[0] = False
    (h * 1.0).sum().backward()  # h's node had half of its gradient when the error came
    np.testing.assert_allclose(x.grad, np.exp(x.data))


def test_backward_refusals():
    x = leaf(2, 3)
    with pytest.raises(RuntimeError, match=r"tensor of shape \(2, 3\) needs a gradient"):
        (x * 1.0).backward()
    with pytest.raises(RuntimeError, match=r"gradient of shape \(3,\) for a tensor of shape \(2, 3\)"):
        (x * 1.0).backward(np.ones(3))
    with pytest.raises(RuntimeError, match="depends on nothing that requires a gradient"):
        Tensor(np.ones(1)).backward()
    with pytest.raises(TypeError, match="only floating tensors can require a gradient, this one is int64"):
        Tensor([1, 2], requires_grad=True)
    with pytest.raises(RuntimeError, match="assign_ is for leaves"):
        (x * 1.0).assign_(0.0)
    (x * 1.0).sum().backward(2.0)
    assert (x.grad == 2).all()


# ---- tensors ------------------------------------------------------------------------------------------


def test_detach_cuts_and_shares():
    x = leaf(3)
    d = (x * 2.0).detach()
    assert d.is_leaf and not d.requires_grad
    (x * d).sum().backward()
    np.testing.assert_allclose(x.grad, 2 * x.data)
    assert x.detach().data is x.data and tensor(x.data).data is not x.data


def test_deep_copies_get_their_own_gradients():
    layer = Linear(3, 2).materialize(0)
    y = layer(
        Tensor(np.ones((1, 3), np.float32))
    )  # a live graph: its leaves must not be shared with the copy
    twin = copy.deepcopy(layer)
    twin(Tensor(np.ones((1, 3), np.float32))).sum().backward()
    assert layer.weight.grad is None and twin.weight.grad is not None
    y.sum().backward()
    assert layer.weight.grad is not None


def test_repr():
    assert repr(Tensor([1.0, 2.0], requires_grad=True)) == "Tensor([1., 2.], float32, requires_grad=True)"
