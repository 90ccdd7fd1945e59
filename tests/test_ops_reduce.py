"""Reductions: gradients, dtypes, ties, infinities, refusals."""

import numpy as np
import pytest

from minipar import ops
from minipar.tensor import Tensor
from tests.op_cases import listed, shape
from tests.op_checks import check_dtypes, check_gradient


@pytest.mark.parametrize("name, case", listed(shape.REDUCE))
def test_gradient(name, case):
    check_gradient(case)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name, case", listed(shape.REDUCE))
def test_dtype(name, case, dtype):
    check_dtypes(case, dtype)


def test_equal_extremes_share_the_gradient():
    x = Tensor(np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), requires_grad=True)
    x.amax(axis=1).sum().backward()
    np.testing.assert_allclose(x.grad, [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])


def test_logsumexp_is_exact_for_extreme_rows():
    x = Tensor(np.array([[1e4, 1e4], [-1e4, -1e4], [-np.inf, 0.0], [-np.inf, -np.inf]]), requires_grad=True)
    with np.errstate(all="raise"):
        y = x.logsumexp(axis=1)
        y.backward(np.ones(4))
    np.testing.assert_allclose(y.data, [1e4 + np.log(2), -1e4 + np.log(2), 0, -np.inf])
    np.testing.assert_allclose(x.grad, [[0.5, 0.5], [0.5, 0.5], [0, 1], [0, 0]])


def test_argmax_is_a_plain_integer_tensor():
    x = Tensor(np.array([[1.0, 5.0], [7.0, 2.0]]), requires_grad=True)
    assert x.argmax(axis=1).data.tolist() == [1, 0] and x.argmax().item() == 2
    assert not x.argmax().requires_grad


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x: x.sum(axis=2), r"^sum: axis 2 .*\(2, 3\)"),
        (lambda x: x.mean(axis=(0, 0)), r"^mean: duplicate"),
        (lambda x: x.amax(axis=-3), r"^amax: axis -3"),
        (lambda x: x[:0].amax(axis=0), r"^amax: zero-size.*\(0, 3\)"),
        (lambda x: x.var(axis=0, correction=2), "^var: 2 elements are too few for correction 2"),
        (lambda x: x.cumsum(axis=4), "^cumsum: axis 4"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises((ValueError, IndexError), match=message) as caught:
        wrong(Tensor(np.ones((2, 3))))
    assert "\n" not in str(caught.value)


def test_prod_refuses_the_gradient_at_zero_by_name():
    x = Tensor(np.array([0.0, 2.0]), requires_grad=True)
    assert ops.prod(x).item() == 0
    with pytest.raises(ValueError, match=r"^prod: .*zero factor"):
        ops.prod(x).backward()
