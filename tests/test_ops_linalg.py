"""Matrix products: gradients, dtypes, float16 accumulation, refusals."""

import numpy as np
import pytest

from minipar import ops
from minipar.tensor import Tensor
from tests.op_cases import linalg, listed
from tests.op_checks import check_dtypes, check_gradient


@pytest.mark.parametrize("name, case", listed(linalg.CASES))
def test_gradient(name, case):
    check_gradient(case)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name, case", listed(linalg.CASES))
def test_dtype(name, case, dtype):
    check_dtypes(case, dtype)


def test_float16_products_accumulate_in_float32():
    # 4096 ones summed in float16 stop at 2048, where adding 1 no longer changes the sum.
    a, b = Tensor(np.ones((1, 4096), np.float16)), Tensor(np.ones((4096, 1), np.float16))
    for y in (a @ b, ops.linear(a, b.T), ops.einsum("ij,jk->ik", a, b)):
        assert y.dtype == np.float16 and y.item() == 4096
    rng = np.random.default_rng(0)
    x, w = (
        Tensor(rng.standard_normal(s).astype(np.float16), requires_grad=True) for s in ((64, 300), (300, 8))
    )
    (x @ w).backward(np.ones((64, 8), np.float16))
    exact = x.data.astype(np.float64).T @ np.ones((64, 8))
    assert np.abs(w.grad - exact).max() <= np.abs(exact).max() * 2**-10


def test_unwanted_products_are_not_computed(monkeypatch):
    calls = []
    kernel = ops.linalg.kernels.of(np.zeros(1))
    for name in ("linear_backward_input", "linear_backward_weight", "linear_backward_bias"):
        original = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    w = Tensor(np.ones((4, 3)), requires_grad=True)
    ops.linear(Tensor(np.ones((2, 3))), w).sum().backward()
    assert calls == ["linear_backward_weight"]
    calls.clear()
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    ops.linear(x, Tensor(np.ones((4, 3))), Tensor(np.ones(4))).sum().backward()
    assert calls == ["linear_backward_input"]


def test_einsum_takes_spaces():
    a, b = Tensor(np.ones((2, 3))), Tensor(np.ones((3, 4)))
    np.testing.assert_array_equal(ops.einsum("i j, j k -> i k", a, b).data, a.data @ b.data)


A, B = Tensor(np.ones((2, 3))), Tensor(np.ones((2, 3)))
W = Tensor(np.ones((4, 3)))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: A @ B, r"^matmul: \(2, 3\) @ \(2, 3\) is not"),
        (lambda: A @ Tensor(2.0), r"^matmul: \(2, 3\) @ \(\)"),
        (lambda: Tensor(np.ones((2, 1, 2, 3))) @ Tensor(np.ones((3, 3, 3, 4))), r"^matmul: .*broadcast"),
        (lambda: ops.linear(Tensor(np.ones((5, 4))), W), r"^linear: weight \(4, 3\).*got \(5, 4\)"),
        (lambda: ops.linear(A, Tensor(np.ones(3))), r"^linear: weight \(3,\)"),
        (lambda: ops.linear(Tensor(1.0), W), r"^linear: weight \(4, 3\).*got \(\)"),
        (lambda: ops.linear(A, W, Tensor(np.ones(1))), r"^linear: .*bias \(4,\), got \(1,\)"),
        (lambda: ops.embedding(W, np.array([0, 4])), r"^embedding: .*4.*0\.\.3"),
        (lambda: ops.embedding(W, np.array([-1])), r"^embedding: .*-1"),
        (lambda: ops.embedding(W, np.array([1.0])), r"^embedding: .*integers"),
        (lambda: ops.einsum("ij,jk", A, B), r"^einsum: .*'->'"),
        (lambda: ops.einsum("ii->i", A), r"^einsum: 'ii' repeats a letter"),
        (lambda: ops.einsum("...i->i", A), r"^einsum: "),
        (lambda: ops.einsum("ij,jk->ik", A, B), r"^einsum: 'j' .* is 3 and 2 long"),
        (lambda: ops.einsum("ij,jk->ik", A, Tensor(np.ones((1, 4)))), r"^einsum: 'j' .* is 3 and 1 long"),
        (lambda: ops.einsum("ijk->i", A), r"^einsum: .*does not fit"),
        (lambda: ops.einsum("ij->iz", A), r"^einsum: "),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises((ValueError, IndexError), match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)
