"""Convolution and pooling over images (N, C, H, W)."""

from __future__ import annotations

from typing import Any

from minipar import kernels
from minipar.backend import Array, array_module
from minipar.kernels.common import widen
from minipar.tensor import Tensor, primitive

Pair = int | tuple[int, int]


def pair(value: Pair) -> tuple[int, int]:
    """Return (height, width) from one number or two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


@primitive(handles=("weight",), precision="low")
def _conv2d(x, weight, bias, stride, padding, dilation, groups, *, unrounded=False):
    k, w = kernels.of(x), weight.data
    if w.size == 0:  # a share of no channels: a sum of no terms, or no outputs
        size = output_size("conv2d", x.shape, w.shape[2:], stride, padding, dilation)
        xp, full = array_module(x), (x.shape[0], w.shape[0], *size)
        y = xp.zeros(full, dtype=widen(x).dtype if unrounded else x.dtype)
        y = y + (0 if bias is None else bias.reshape(-1, 1, 1))
        return y, lambda g: (xp.zeros_like(x), xp.zeros_like(weight.data), lambda: g.sum(axis=(0, 2, 3)))
    y = k.conv2d(widen(x) if unrounded else x, w, bias, stride, padding, dilation, groups)
    window, size = (stride, padding, dilation, groups), w.shape[2:]

    def vjp(g: Array) -> Any:
        g = g.astype(x.dtype, copy=False) if unrounded else g
        return (
            lambda: k.conv2d_backward_input(g, weight.data, x.shape, *window),
            lambda: k.conv2d_backward_weight(g, x, size, *window),
            lambda: k.conv2d_backward_bias(g),
        )

    return y, vjp


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    unrounded: bool = False,
) -> Tensor:
    """Cross-correlation, as in torch.nn.functional.conv2d.

    x (N, C, H, W), weight (O, C/groups, kh, kw), bias (O,) → (N, O, H', W') with
    H' = ⌊(H + 2·padding - dilation·(kh - 1) - 1) / stride⌋ + 1.

    Args:
        unrounded: return float32 where x is a two-byte float, see `ops.linear`.

    Raises:
        ValueError: channels that do not fit or do not divide by groups, or a window larger than the image.
    """
    if len(weight.shape) != 4:
        raise ValueError(f"conv2d: weight must be (O, C/groups, kh, kw), got {weight.shape}")
    o, c = weight.shape[0], weight.shape[1]
    if x.ndim != 4 or groups < 1 or x.shape[1] != c * groups or o % groups:
        raise ValueError(
            f"conv2d: input must be (N, {c * groups}, H, W) for weight {weight.shape} and {groups} groups,"
            f" got {x.shape}; {o} output channels must divide by the groups"
        )
    if bias is not None and bias.shape != (o,):
        raise ValueError(f"conv2d: bias must be ({o},) for weight {weight.shape}, got {bias.shape}")
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    output_size("conv2d", x.shape, weight.shape[2:], stride, padding, dilation)
    return _conv2d(x, weight, bias, stride, padding, dilation, groups, unrounded=unrounded)


def output_size(
    name: str, shape: tuple[int, ...], kernel: Any, stride: Any, padding: Any, dilation: Any = (1, 1)
) -> tuple[int, int]:
    """Return (H', W') of a window over an image of `shape` (N, C, H, W); ValueError if nothing is left."""
    if len(shape) != 4:
        raise ValueError(f"{name}: input must be (N, C, H, W), got {shape}")
    if min(*kernel, *stride, *dilation) < 1 or min(*padding) < 0:
        raise ValueError(
            f"{name}: kernel {tuple(kernel)}, stride {stride} and dilation {dilation} must be at least 1,"
            f" padding {padding} at least 0"
        )
    h, w = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape[2:], kernel, stride, padding, dilation)
    )
    if h < 1 or w < 1:
        raise ValueError(
            f"{name}: a window of {tuple(kernel)} with padding {padding} does not fit an image of {shape[2:]}"
        )
    return h, w


@primitive(fresh=True)
def _max_pool2d(x, kernel, stride, padding):
    k = kernels.of(x)
    y, saved = k.max_pool2d(x, kernel, stride, padding)
    shape = x.shape
    return y, lambda g: (k.max_pool2d_backward(g, saved, shape, kernel, stride, padding), None, None, None)


@primitive(fresh=True)
def _avg_pool2d(x, kernel, stride, padding):
    k, shape = kernels.of(x), x.shape
    y = k.avg_pool2d(x, kernel, stride, padding)
    return y, lambda g: (k.avg_pool2d_backward(g, shape, kernel, stride, padding), None, None, None)


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """Largest value in each window: (N, C, H, W) → (N, C, H', W'); stride defaults to the kernel."""
    size = pair(kernel)
    step, around = pair(kernel if stride is None else stride), pair(padding)
    output_size("max_pool2d", x.shape, size, step, around)
    return _max_pool2d(x, size, step, around)


def avg_pool2d(x: Tensor, kernel: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """Mean of each window, padding counted (PyTorch's default); stride defaults to the kernel."""
    size = pair(kernel)
    step, around = pair(kernel if stride is None else stride), pair(padding)
    output_size("avg_pool2d", x.shape, size, step, around)
    return _avg_pool2d(x, size, step, around)
