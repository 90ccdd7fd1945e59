"""Elementwise primitives: gradients, dtypes, broadcasting, refusals; and that no primitive goes unchecked."""

import numpy as np
import pytest

from minipar import ops
from minipar.gradcheck import gradcheck
from minipar.ops.elementwise import unbroadcast
from minipar.tensor import Tensor, primitive
from tests.op_cases import ALL, elementwise, listed
from tests.op_checks import check_dtypes, check_gradient

NOT_DIFFERENTIABLE = {"argmax", "equal", "greater", "greater_equal", "less", "less_equal", "not_equal"}


def test_every_primitive_has_a_gradient_case():
    offered = {n for n, v in vars(ops).items() if callable(v) and not n.startswith("_")}
    assert offered - NOT_DIFFERENTIABLE - ALL.keys() == set(), "no case in tests/op_cases for these"
    assert (ALL.keys() | NOT_DIFFERENTIABLE) - offered == set(), "cases for operations that do not exist"
    assert all(ALL.values())


@pytest.mark.parametrize("name, case", listed(elementwise.CASES))
def test_gradient(name, case):
    check_gradient(case)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name, case", listed(elementwise.CASES))
def test_dtype(name, case, dtype):
    check_dtypes(case, dtype)


@pytest.mark.parametrize("scalar", [2, 2.5, True, np.float64(2.5), np.float32(2.5), np.int64(2)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_scalar_never_widens(dtype, scalar):
    x = Tensor(np.array([1.0, 2.0], dtype), requires_grad=True)
    results = [x + scalar, scalar + x, x - scalar, scalar - x, x * scalar, scalar * x, x / scalar, scalar / x]
    results += [x**scalar, ops.maximum(x, scalar), ops.minimum(x, scalar), ops.where(x > scalar, x, scalar)]
    if not isinstance(scalar, bool):
        results.append(scalar**x)
    for y in results:
        assert y.dtype == dtype
        x.grad = None
        y.sum().backward()
        assert x.grad.dtype == dtype


def test_python_numbers_are_float32_and_arrays_keep_their_dtype():
    assert Tensor(1.5).dtype == np.float32 and Tensor([1.0, 2.0]).dtype == np.float32
    assert Tensor(3).dtype == np.int64 and Tensor(np.ones(2)).dtype == np.float64
    assert Tensor([1.0], dtype=np.float16).dtype == np.float16


def test_arrays_on_the_left_defer_to_the_tensor():
    a, x = np.array([[1.0, 2.0], [3.0, 4.0]]), Tensor(np.array([5.0, 6.0]), requires_grad=True)
    for y, expected in (
        (a + x, a + x.data),
        (a - x, a - x.data),
        (a * x, a * x.data),
        (a / x, a / x.data),
        (a @ x, a @ x.data),
        (a**x, a**x.data),
    ):
        assert isinstance(y, Tensor)
        np.testing.assert_array_equal(y.data, expected)
    assert isinstance(a > x, Tensor)


def test_unbroadcast_sums_what_was_repeated():
    g = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(unbroadcast(g, (3, 1)), g.sum(axis=(0, 2)).reshape(3, 1))
    np.testing.assert_array_equal(unbroadcast(g, ()), g.sum())
    assert unbroadcast(g, (2, 3, 4)) is g
    assert unbroadcast(np.ones((2, 0)), (2, 1)).tolist() == [[0.0], [0.0]]


def test_equal_competitors_share_the_gradient():
    for op in (ops.maximum, ops.minimum):
        a, b = (Tensor(np.array([1.0, 2.0]), requires_grad=True) for _ in range(2))
        op(a, b).sum().backward()
        assert a.grad.tolist() == b.grad.tolist() == [0.5, 0.5]


def test_extreme_inputs_stay_finite():
    x = Tensor(np.array([-1e4, 0.0, 1e4], np.float32), requires_grad=True)
    for op in (ops.sigmoid, ops.tanh, ops.silu, ops.gelu, lambda t: ops.gelu(t, "none"), ops.erf):
        x.grad = None
        with np.errstate(over="raise", invalid="raise"):
            y = op(x)
            y.sum().backward()
        assert np.isfinite(y.data).all() and np.isfinite(x.grad).all()
    x = Tensor(np.zeros(2), requires_grad=True)
    (x**0 + x**1 + x**2).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]


def test_comparisons_are_plain_booleans():
    a = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    for name, expected in (
        ("greater", [0, 0, 1]),
        ("greater_equal", [0, 1, 1]),
        ("less", [1, 0, 0]),
        ("less_equal", [1, 1, 0]),
        ("equal", [0, 1, 0]),
        ("not_equal", [1, 0, 1]),
    ):
        y = getattr(ops, name)(a, 2.0)
        assert y.dtype == bool and not y.requires_grad and y.data.tolist() == [bool(e) for e in expected]
    assert (a > 2).data.tolist() == [False, False, True] and (a <= 1).data.tolist() == [True, False, False]
    assert a == a and a != 2.0  # identity, so tensors can be dictionary keys


def test_astype_returns_the_gradient_in_the_own_dtype():
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    y = x.astype(np.float64)
    assert y.dtype == np.float64
    y.sum().backward()
    assert x.grad.dtype == np.float32


def test_truth_and_float_of_one_element():
    assert float(Tensor([2.5])[0]) == 2.5
    assert not Tensor([0.0]) and Tensor([3.0]) and bool(Tensor(1.0) > 0.5)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(Tensor([1.0, 2.0]))


def test_wrong_shapes_are_one_line_that_names_the_operation():
    a, b = Tensor(np.ones((2, 3))), Tensor(np.ones((4,)))
    for name in ("add", "sub", "mul", "div", "maximum"):
        with pytest.raises(ValueError, match=rf"^{name}: .*\(2, 3\) float64, \(4,\) float64") as caught:
            getattr(ops, name)(a, b)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"^add: "):
        a + "text"


def test_gradcheck_catches_wrong_gradients():
    @primitive
    def wrong(x):
        return x * x, lambda g: g * x

    @primitive
    def misshapen(x):
        return x * 1.0, lambda g: g[0]

    with pytest.raises(AssertionError, match="input 0: backward says"):
        gradcheck(wrong, [np.array([1.0, 2.0])])
    with pytest.raises(AssertionError, match="gradient of shape"):
        gradcheck(misshapen, [np.ones((2, 3))])


def test_an_argument_given_by_name_gets_its_gradient():
    @primitive
    def scaled(x, unused=None, weight=1.0):
        return x * weight, lambda g: (lambda: g * weight, None, lambda: g * x)

    x, w = (Tensor(np.array([2.0]), requires_grad=True) for _ in range(2))
    scaled(x, weight=w).sum().backward()
    assert x.grad.tolist() == w.grad.tolist() == [2.0]
    with pytest.raises(TypeError, match=r"scaled.*nonsense"):
        scaled(x, nonsense=1)
