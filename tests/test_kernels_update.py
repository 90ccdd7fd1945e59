"""Random bits and optimizer steps: the fast kernels are bitwise the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest

from minipar.kernels import cpu, plain
from tests.kernel_checks import DOUBLE, HALF, SINGLE, make


@pytest.mark.parametrize("module", [cpu, plain])
def test_splitmix64_gives_the_published_stream(module):
    stream = module.splitmix64(1234567, np.arange(5, dtype=np.uint64)).tolist()
    assert stream[:3] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert stream[3:] == [4593380528125082431, 16408922859458223821]


def test_splitmix64_is_bitwise_the_same_on_both():
    index = np.random.default_rng(0).integers(0, 2**64, (3, 30_000), dtype=np.uint64)
    for key in (0, 2**64 - 1, -5):
        np.testing.assert_array_equal(cpu.splitmix64(key, index.T), plain.splitmix64(key, index.T))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_mask(p):
    keep = cpu.dropout_mask((30, 1001), p, key=99, start=7)
    np.testing.assert_array_equal(keep, plain.dropout_mask((30, 1001), p, key=99, start=7))
    uniform = (cpu.splitmix64(99, np.arange(7, 7 + keep.size, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53
    np.testing.assert_array_equal(keep.ravel(), uniform >= p)
    assert abs(keep.mean() - (1 - p)) < 0.01
    part = cpu.dropout_mask((20, 1001), p, key=99, start=7 + 10 * 1001)
    np.testing.assert_array_equal(part, keep[10:])  # a rank's shard is the serial mask's
    assert cpu.dropout_mask((0, 3), p, 1, 0).shape == (0, 3)


def test_dropout_refuses_an_impossible_probability():
    with pytest.raises(ValueError, match=r"dropout probability must be in 0\.\.1, but is 1\.5"):
        cpu.dropout_mask((2,), 1.5, 1, 0)


# ---- optimizer steps -----------------------------------------------------------------------------------


def layouts(size):
    """The same numbers as a vector, a matrix and a strided view."""
    flat = make(size, 2)
    return [flat[:, 0].copy(), flat.copy(), flat[:, 1], flat.T]


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_step_is_bitwise_the_plain_formula(dtype, decoupled):
    for layout in layouts(60_000):
        fast, slow = ([layout.astype(dtype, order="K") * s for s in (1, 0, 0)] for _ in range(2))
        for step in (1, 2, 3):
            g = make(*layout.shape, dtype=dtype, seed=step)
            options = (1e-2, 0.9, 0.999, 1e-8, 0.1, step, decoupled)
            cpu.adam_step_(fast[0], g, fast[1], fast[2], *options)
            plain.adam_step_(slow[0], g, slow[1], slow[2], *options)
        for a, b in zip(fast, slow):
            np.testing.assert_array_equal(a, b)


RULES = [(0.0, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]


@pytest.mark.parametrize("momentum, damping, nesterov", RULES)
def test_sgd_step_is_bitwise_the_plain_formula(momentum, damping, nesterov):
    for layout in layouts(60_000):
        fast, slow = ([layout.astype(SINGLE, order="K") * s for s in (1, 0)] for _ in range(2))
        for step in (1, 2, 3):
            g = make(*layout.shape, dtype=SINGLE, seed=step)
            for module, (p, buf) in ((cpu, fast), (plain, slow)):
                state = buf if momentum else None
                module.sgd_step_(p, g, state, 0.1, momentum, damping, nesterov, 0.01, step == 1)
        for a, b in zip(fast, slow):
            np.testing.assert_array_equal(a, b)


def test_optimizer_steps_write_into_strided_parameters():
    whole = np.ones((4, 6), SINGLE)
    view = whole[:, ::2]
    cpu.sgd_step_(view, np.ones((4, 3), SINGLE), None, 0.5, 0.0, 0.0, False, 0.0, True)
    assert (whole[:, ::2] == 0.5).all() and (whole[:, 1::2] == 1).all()


def test_optimizer_steps_take_a_float16_gradient_in_the_parameters_precision():
    g, p = np.full(3, 6e4, HALF), np.zeros(3, SINGLE)
    m, v = np.zeros((2, 3), SINGLE)
    cpu.adam_step_(p, g, m, v, 1e-2, 0.9, 0.999, 1e-8, 0.0, 1, True)  # g * g overflows float16
    np.testing.assert_allclose(p, -1e-2, rtol=1e-5)
    cpu.sgd_step_(p, g, m, 10.0, 0.9, 0.0, True, 0.0, True)
    np.testing.assert_allclose(p, -1.9 * 10 * float(g[0]), rtol=1e-5)
