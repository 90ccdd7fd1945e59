"""Gives tensors their operators and methods: `x + y`, `x @ w`, `x[1:]`, `x.sum(axis=0)`, `x.T`."""

from __future__ import annotations

from typing import Any

from minipar.ops import elementwise, linalg, normalisation, reduce, shape
from minipar.tensor import Tensor


def _variadic(operation: Any) -> Any:
    """Let x.reshape(2, 3) mean x.reshape((2, 3))."""

    def method(x: Tensor, *sizes: Any) -> Tensor:
        return operation(x, sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes)

    return method


Tensor.__add__ = elementwise.add
Tensor.__sub__ = elementwise.sub
Tensor.__mul__ = elementwise.mul
Tensor.__truediv__ = elementwise.div
Tensor.__pow__ = elementwise.pow
Tensor.__matmul__ = linalg.matmul
Tensor.__radd__ = lambda x, other: elementwise.add(x, other)
Tensor.__rsub__ = lambda x, other: elementwise.sub(other, x)
Tensor.__rmul__ = lambda x, other: elementwise.mul(x, other)
Tensor.__rtruediv__ = lambda x, other: elementwise.div(other, x)
Tensor.__rpow__ = lambda x, other: elementwise.pow(other, x)
Tensor.__rmatmul__ = lambda x, other: linalg.matmul(other, x)
Tensor.__neg__ = elementwise.neg
Tensor.__getitem__ = shape.getitem

# `==` stays identity, so that tensors can be keys; the elementwise comparison is `ops.equal`.
Tensor.__gt__ = lambda a, b: elementwise.greater(a, b)
Tensor.__ge__ = lambda a, b: elementwise.greater_equal(a, b)
Tensor.__lt__ = lambda a, b: elementwise.less(a, b)
Tensor.__le__ = lambda a, b: elementwise.less_equal(a, b)

for _module, _names in (
    (elementwise, "abs astype clamp cos erf exp gelu log relu sigmoid silu sin sqrt square tanh"),
    (reduce, "amax amin argmax cumsum logsumexp max mean min prod std sum var"),
    (shape, "broadcast_to chunk contiguous flatten flip gather pad roll split squeeze swapaxes"),
    (shape, "transpose tril unsqueeze"),
    (normalisation, "softmax log_softmax"),
    (linalg, "matmul"),
):
    for _op in _names.split():
        setattr(Tensor, _op, getattr(_module, _op))

Tensor.reshape = _variadic(shape.reshape)
Tensor.permute = _variadic(shape.permute)
Tensor.T = property(shape.transpose)
