"""Primitives that move elements: gradients, dtypes, values, refusals."""

import numpy as np
import pytest

from minipar import ops
from minipar.errors import UsageError
from minipar.tensor import Tensor
from tests.op_cases import listed, shape
from tests.op_checks import check_dtypes, check_gradient


@pytest.mark.parametrize("name, case", listed(shape.SHAPE))
def test_gradient(name, case):
    check_gradient(case)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name, case", listed(shape.SHAPE))
def test_dtype(name, case, dtype):
    check_dtypes(case, dtype)


def test_values_follow_numpy():
    a = np.arange(24.0).reshape(2, 3, 4)
    x = Tensor(a)
    assert x.T.shape == (4, 3, 2)
    np.testing.assert_array_equal(ops.transpose(x, 0, 2).data, a.swapaxes(0, 2))
    np.testing.assert_array_equal(x[1, :, ::-1].data, a[1, :, ::-1])
    np.testing.assert_array_equal(x[Tensor([1, 1])].data, a[[1, 1]])
    np.testing.assert_array_equal(x[:, Tensor([2, 0])].data, a[:, [2, 0]])
    assert [p.shape for p in x.split(3, axis=2)] == [(2, 3, 3), (2, 3, 1)]
    assert [p.shape for p in x.chunk(2, axis=1)] == [(2, 2, 4), (2, 1, 4)]
    assert x.split(4, axis=2)[0] is x
    assert [len(row) for row in x] == [3, 3]


def test_transpose_takes_two_axes_or_none():
    x = Tensor(np.zeros((2, 3, 4)))
    assert ops.transpose(x).shape == (4, 3, 2)
    for axes in ((1,), (None, 1)):
        with pytest.raises(UsageError, match="give both, or neither"):
            ops.transpose(x, *axes)


def test_an_unused_piece_of_a_split_gets_zeros():
    x = Tensor(np.ones(5), requires_grad=True)
    a, _, c = x.split([2, 1, 2])
    (a.sum() + 2 * c.sum()).backward()
    assert x.grad.tolist() == [1, 1, 0, 2, 2]


def test_repeated_indices_add_up():
    x = Tensor(np.zeros((3, 2)), requires_grad=True)
    x[np.array([1, 1, 1])].sum().backward()
    assert x.grad.tolist() == [[0, 0], [3, 3], [0, 0]]
    x.grad = None
    ops.gather(x, np.array([[0, 0], [1, 1], [1, 0]]), 1).sum().backward()
    assert x.grad.tolist() == [[2, 0], [0, 2], [1, 1]]


def test_contiguous_copies_only_if_needed():
    x = Tensor(np.ones((2, 3)))
    assert ops.contiguous(x).data is x.data
    assert ops.contiguous(x.T).data.flags.c_contiguous
    assert ops.contiguous(Tensor(np.array(1.0))).shape == ()


X = Tensor(np.ones((2, 3)))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: X.reshape(4, 2), r"^reshape: .*\(2, 3\)"),
        (lambda: X.permute(0, 0), r"^permute: .*\(2, 3\)"),
        (lambda: X.swapaxes(0, 5), r"^swapaxes: .*\(2, 3\)"),
        (lambda: X.squeeze(0), r"^squeeze: axis 0 of shape \(2, 3\) has length 2"),
        (lambda: ops.broadcast_to(X, (4, 3)), r"^broadcast_to: .*\(2, 3\)"),
        (lambda: ops.concat([X, Tensor(np.ones((2, 4)))]), r"^concat: .*\(2, 3\) float64, \(2, 4\)"),
        (lambda: ops.concat([]), "^concat: no tensors"),
        (lambda: ops.stack([X, Tensor(np.ones((3, 2)))]), r"^stack: .*\(2, 3\), \(3, 2\)"),
        (lambda: ops.stack([]), "^stack: "),
        (lambda: X.split([1, 1], axis=1), r"^split: sizes \[1, 1\] add up to 2, axis 1 has length 3"),
        (lambda: X.split([4, -1], axis=1), r"^split: sizes"),
        (lambda: X.split(0), "^split: pieces of length 0"),
        (lambda: X.chunk(0), "^chunk: 0 pieces"),
        (lambda: ops.pad(X, ((1, 1),)), r"^pad: widths .* each axis of \(2, 3\)"),
        (lambda: ops.gather(X, np.zeros((1, 3), int), 1), r"^gather: index \(1, 3\).*\(2, 3\)"),
        (lambda: ops.gather(X, np.full((2, 3), 7), 1), r"^gather: .*out of bounds"),
        (lambda: X[5], r"^getitem: .*out of bounds.*\(2, 3\)"),
        (lambda: X[0, 0, 0], r"^getitem: too many indices"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises((ValueError, IndexError), match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)
