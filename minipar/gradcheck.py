"""Numeric checks of gradients: central differences along random directions.

For y = f(x), a random u of y's shape and a random direction v of x's shape, backward with gradient u gives
∂(u·y)/∂x, so its product with v must equal (u·f(x + εv) - u·f(x - εv)) / 2ε up to O(ε²). A few random
directions see every element at once, where checking elements one by one would sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minipar.backend import Array
from minipar.tape import no_grad
from minipar.tensor import Tensor


def gradcheck(
    fn: Callable[..., Any],
    inputs: Sequence[Array],
    *,
    eps: float = 1e-6,
    tol: float = 1e-7,
    directions: int = 3,
    seed: int = 0,
) -> float:
    """Compare backward of `fn` with central differences and return the worst relative error.

    Args:
        fn: takes one tensor per input, returns a tensor or a tuple of them.
        inputs: float64 arrays, each differentiated.
        eps: half width of the difference, relative to inputs of order 1.
        tol: largest error allowed, relative to the size of the directional derivative or 1.

    Raises:
        AssertionError: an error above `tol`, or a gradient of the wrong shape or dtype; names the input.
    """
    rng = np.random.default_rng(seed)

    def value(arrays: Sequence[Array], weights: list[Array]) -> float:
        with no_grad():
            out = fn(*(Tensor(a) for a in arrays))
        outs = out if isinstance(out, tuple) else (out,)
        return sum(float((o.data * u).sum()) for o, u in zip(outs, weights))

    tensors = [Tensor(a.copy(), requires_grad=True) for a in inputs]
    out = fn(*tensors)
    outs = out if isinstance(out, tuple) else (out,)
    weights = [rng.standard_normal(o.shape) for o in outs]
    total = sum(((o * u).sum() for o, u in zip(outs[1:], weights[1:])), start=(outs[0] * weights[0]).sum())
    total.backward()

    worst = 0.0
    for i, (t, a) in enumerate(zip(tensors, inputs)):
        g = t.grad if t.grad is not None else np.zeros_like(a)
        assert g.shape == a.shape, f"input {i}: gradient of shape {g.shape} for {a.shape}"
        assert g.dtype == a.dtype, f"input {i}: gradient of dtype {g.dtype} for {a.dtype}"
        for _ in range(directions):
            v = rng.standard_normal(a.shape)
            plus, minus = list(inputs), list(inputs)
            plus[i], minus[i] = a + eps * v, a - eps * v
            numeric = (value(plus, weights) - value(minus, weights)) / (2 * eps)
            analytic = float((g * v).sum())
            error = abs(numeric - analytic) / max(abs(numeric), 1.0)
            worst = max(worst, error)
            assert error <= tol, (
                f"input {i}: backward says {analytic:.9g}, differences say {numeric:.9g} ({error:.1e})"
            )
    return worst
