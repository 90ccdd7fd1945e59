"""Convolution and pooling: the fast kernels against their plain formulas."""

from __future__ import annotations

import numpy as np
import pytest

from minipar.kernels import cpu, plain
from tests.kernel_checks import EVERY_DTYPE, HALF, check, make

CONVOLUTIONS = [  # N, C, H, W, O, groups, kernel, stride, padding, dilation
    (2, 3, 7, 8, 4, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 4, 9, 6, 6, 2, (3, 2), (2, 1), (1, 0), (1, 2)),
    (2, 4, 11, 11, 4, 4, (3, 3), (2, 2), (1, 1), (1, 1)),
    (2, 4, 6, 9, 6, 2, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 2, 9, 9, 3, 1, (1, 1), (2, 2), (0, 0), (1, 1)),
    (1, 2, 12, 12, 3, 1, (3, 3), (3, 3), (0, 0), (2, 2)),
    (5, 2, 4, 4, 3, 1, (5, 5), (1, 1), (2, 2), (1, 1)),
    (2, 3, 13, 10, 2, 1, (2, 2), (4, 3), (3, 1), (1, 1)),
    (2, 3, 5, 5, 2, 1, (3, 3), (2, 2), (5, 4), (1, 3)),
    (2, 2, 4, 1, 3, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    (0, 3, 5, 5, 2, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (70, 16, 16, 16, 8, 1, (3, 3), (1, 1), (1, 1), (1, 1)),  # several blocks, the last one short
]


@EVERY_DTYPE
@pytest.mark.parametrize("n, c, h, w, out, groups, kernel, stride, padding, dilation", CONVOLUTIONS)
def test_conv2d(dtype, n, c, h, w, out, groups, kernel, stride, padding, dilation):
    x = make(n, h, w, c, dtype=dtype, scale=0.3).transpose(0, 3, 1, 2)  # channels last: strided
    weight, bias = make(out, c // groups, *kernel, dtype=dtype), make(out, dtype=dtype, seed=1)
    where = (stride, padding, dilation, groups)
    y = check("conv2d", x, weight, bias, *where)
    check("conv2d", x, weight, None, *where)
    g = make(*y.shape, dtype=dtype, seed=2, scale=0.3)
    check("conv2d_backward_input", g, weight, x.shape, *where)
    loose = 1e-2 if dtype is HALF else None
    check("conv2d_backward_weight", g, x, kernel, *where, tolerance=loose)
    check("conv2d_backward_bias", g, tolerance=loose)


@pytest.mark.parametrize("module", [cpu, plain])
def test_conv2d_refuses_sizes_that_do_not_fit(module):
    where = ((1, 1), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="groups=2 must divide the 3 input and 4 output channels"):
        module.conv2d(make(1, 3, 5, 5), make(4, 1, 3, 3), None, *where, 2)
    with pytest.raises(ValueError, match="expects 2 input channels, but x has 3"):
        module.conv2d(make(1, 3, 5, 5), make(4, 2, 3, 3), None, *where, 1)
    with pytest.raises(ValueError, match="a window reaching over 6 elements does not fit in 5"):
        module.conv2d(make(1, 3, 5, 5), make(4, 3, 6, 1), None, *where, 1)


def test_im2col_and_col2im_are_transposes():
    shape, where = (2, 3, 7, 6), ((3, 2), (2, 1), (1, 1), (1, 2))
    x = make(*shape)
    cols = check("im2col", x, *where)
    other = make(*cols.shape, seed=1)
    back = check("col2im", other, shape, *where)
    assert (cols * other).sum() == pytest.approx((x * back).sum(), rel=1e-12)


POOLS = [  # kernel, stride, padding
    ((2, 2), (2, 2), (0, 0)),
    ((3, 2), (2, 1), (1, 1)),
    ((2, 3), (3, 3), (0, 1)),
    ((7, 6), (1, 1), (0, 0)),
]


@EVERY_DTYPE
@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("kernel, stride, padding", POOLS)
def test_pools(dtype, n, kernel, stride, padding):
    x = make(n, 2, 7, 6, dtype=dtype)
    where = (kernel, stride, padding)
    y, saved = check("max_pool2d", x, *where)
    g = make(*y.shape, dtype=dtype, seed=1)
    check("max_pool2d_backward", g, saved, x.shape, *where)
    check("avg_pool2d", x, *where)
    check("avg_pool2d_backward", g, x.shape, *where)


def test_max_pool_gives_the_gradient_to_the_first_of_equals():
    x, g = np.zeros((1, 1, 2, 4)), np.ones((1, 1, 1, 2))
    _, saved = cpu.max_pool2d(x, (2, 2), (2, 2), (0, 0))
    dx = cpu.max_pool2d_backward(g, saved, x.shape, (2, 2), (2, 2), (0, 0))
    assert dx[0, 0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("module", [cpu, plain])
def test_pools_refuse_padding_beyond_half_the_kernel(module):
    for name in ("max_pool2d", "avg_pool2d"):
        with pytest.raises(ValueError, match=r"pooling padding \(2, 0\) must be at most half the kernel"):
            getattr(module, name)(make(1, 1, 5, 5), (3, 3), (1, 1), (2, 0))


@pytest.mark.parametrize("module", [cpu, plain])
def test_max_pool_numbers_the_taps_of_a_huge_window(module):
    x = np.zeros((1, 1, 200, 200))
    x[0, 0, 199, 198] = 1
    _, saved = module.max_pool2d(x, (200, 200), (1, 1), (0, 0))
    assert saved.item() == 199 * 200 + 198  # does not fit in 16 bits
