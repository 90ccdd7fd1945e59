"""Gives tensors their operators and methods: `x + y`, `x @ w`, `x[1:]`, `x.sum(axis=0)`, `x.T`."""

from __future__ import annotations

from typing import Any

from minipar.ops import attention, conv, elementwise, linalg, normalisation, reduce, shape
from minipar.tensor import Tensor


def _swapped(operation: Any) -> Any:
    """Return the operation for `array_or_number ∘ tensor`."""
    return lambda self, other: operation(other, self)


def _variadic(operation: Any) -> Any:
    """Let x.reshape(2, 3) mean x.reshape((2, 3))."""
    return lambda self, *sizes: operation(self, sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes)


Tensor.__add__ = elementwise.add  # type: ignore[method-assign]
Tensor.__sub__ = elementwise.sub  # type: ignore[method-assign]
Tensor.__mul__ = elementwise.mul  # type: ignore[method-assign]
Tensor.__truediv__ = elementwise.div  # type: ignore[method-assign]
Tensor.__radd__ = _swapped(elementwise.add)  # type: ignore[method-assign]
Tensor.__rsub__ = _swapped(elementwise.sub)  # type: ignore[method-assign]
Tensor.__rmul__ = _swapped(elementwise.mul)  # type: ignore[method-assign]
Tensor.__rtruediv__ = _swapped(elementwise.div)  # type: ignore[method-assign]
Tensor.__pow__ = elementwise.pow  # type: ignore[method-assign]
Tensor.__neg__ = elementwise.neg  # type: ignore[method-assign]
Tensor.__matmul__ = linalg.matmul  # type: ignore[method-assign]
Tensor.__getitem__ = shape.getitem  # type: ignore[method-assign]

Tensor.__gt__ = lambda a, b: elementwise.greater(a, b)  # type: ignore[attr-defined]
Tensor.__ge__ = lambda a, b: elementwise.greater_equal(a, b)  # type: ignore[attr-defined]
Tensor.__lt__ = lambda a, b: elementwise.less(a, b)  # type: ignore[attr-defined]
Tensor.__le__ = lambda a, b: elementwise.less_equal(a, b)  # type: ignore[attr-defined]

for _module, _names in (
    (elementwise, "abs astype clamp cos erf exp gelu log relu sigmoid silu sin sqrt square tanh"),
    (reduce, "amax amin argmax cumsum logsumexp max mean min prod std sum var"),
    (shape, "broadcast_to chunk contiguous flatten flip gather pad split squeeze swapaxes transpose unsqueeze"),
    (normalisation, "softmax log_softmax"),
    (linalg, "matmul"),
):
    for _op in _names.split():
        setattr(Tensor, _op, getattr(_module, _op))

Tensor.reshape = _variadic(shape.reshape)  # type: ignore[method-assign]
Tensor.permute = _variadic(shape.permute)  # type: ignore[method-assign]
Tensor.T = property(shape.transpose)  # type: ignore[assignment]
