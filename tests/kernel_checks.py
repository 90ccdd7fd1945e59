"""Compare a fast kernel with its plain formula, in values, dtypes and manners: for the kernels' tests."""

from __future__ import annotations

import numpy as np
import pytest

from minipar.kernels import cpu, plain

SINGLE, DOUBLE, HALF = np.float32, np.float64, np.float16
TOLERANCE = {DOUBLE: 1e-12, SINGLE: 2e-5, HALF: 2e-3}


def make(*shape, dtype=DOUBLE, seed=0, scale=1.0):
    return np.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(dtype)


def is_float(a):
    return isinstance(a, np.ndarray) and a.dtype.kind == "f"


def arrays(result):
    """Every array in a kernel's result, in order."""
    return [a for a in (result if isinstance(result, tuple) else (result,)) if a is not None]


def copied(args):
    return [a.copy() if isinstance(a, np.ndarray) else a for a in args]


def in_double(args):
    return [a.astype(DOUBLE) if is_float(a) else a for a in args]


def check(name, *args, tolerance=None, **options):
    """One kernel on both sides: values of the plain formula in float64, dtypes of the plain formula.

    Also that nothing aliases an input and no input is modified. Returns the fast kernel's result.
    """
    before = copied(args)
    fast = getattr(cpu, name)(*args, **options)
    for arg, was in zip(args, before):
        if isinstance(was, np.ndarray):
            np.testing.assert_array_equal(arg, was, err_msg=f"{name} modified an input")
    same = arrays(getattr(plain, name)(*args, **options))
    exact = arrays(getattr(plain, name)(*in_double(args), **options))
    if tolerance is None:
        tolerance = max(TOLERANCE[a.dtype.type] for a in args if is_float(a))
    assert len(arrays(fast)) == len(same)
    for got, also, want in zip(arrays(fast), same, exact):
        assert got.dtype == also.dtype and got.shape == also.shape == want.shape
        assert not any(np.shares_memory(got, a) for a in args if isinstance(a, np.ndarray))
        reach = tolerance * max(1.0, float(np.abs(want).max(initial=0.0)))
        np.testing.assert_allclose(got.astype(DOUBLE), want, rtol=0, atol=reach, err_msg=name)
        np.testing.assert_allclose(also.astype(DOUBLE), want, rtol=0, atol=reach, err_msg=f"plain {name}")
    return fast


EVERY_DTYPE = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE, HALF])
