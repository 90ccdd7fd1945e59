"""The layers, with PyTorch's names, shapes, defaults and initial laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minipar import ops, random
from minipar.backend import Array
from minipar.errors import UsageError
from minipar.nn.init import Constant, Initialiser, Normal, kaiming_uniform
from minipar.nn.module import Buffer, Module, Parameter
from minipar.ops.conv import Pair, pair
from minipar.ops.normalisation import alone, running_average
from minipar.tape import is_replaying
from minipar.tensor import Tensor


class Linear(Module):
    """x Wᵀ + b: (..., in) → (..., out); weight (out, in), bias (out,)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_init: Initialiser | None = None,
        bias_init: Initialiser | None = None,
    ):
        law = kaiming_uniform(in_features)
        self.weight = Parameter((out_features, in_features), weight_init or law)
        self.bias = Parameter((out_features,), bias_init or law) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, bias={self.bias is not None}"


class Embedding(Module):
    """Rows of a table: integers (...) → (..., width); weight (rows, width)."""

    def __init__(self, rows: int, width: int, weight_init: Initialiser | None = None):
        self.weight = Parameter((rows, width), weight_init or Normal(1.0))

    def forward(self, ids: Any) -> Tensor:
        return ops.embedding(self.weight, ids)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class LayerNorm(Module):
    """Layer norm over the last axis: (..., C) → (..., C)."""

    def __init__(self, width: int, eps: float = 1e-5):
        self.weight = Parameter((width,), Constant(1.0))
        self.bias = Parameter((width,), Constant(0.0))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNorm(Module):
    """Root-mean-square norm over the last axis: (..., C) → (..., C)."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.weight = Parameter((width,), Constant(1.0))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GroupNorm(Module):
    """Group norm of each sample alone: (N, C, *) → (N, C, *)."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5):
        if channels % groups:
            raise UsageError(f"GroupNorm: {groups} groups do not divide {channels} channels")
        self.weight = Parameter((channels,), Constant(1.0))
        self.bias = Parameter((channels,), Constant(0.0))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.weight.shape[0]}, eps={self.eps}"


class BatchNorm2d(Module):
    """Batch norm: (N, C, H, W) → same, with running statistics for evaluation.

    Attributes:
        reduce: sums an array over all that share the batch; the batch's statistics come from it. The default
            is this model alone; a wrapper that spreads the batch over ranks sets it to their sum.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        self.weight = Parameter((channels,), Constant(1.0))
        self.bias = Parameter((channels,), Constant(0.0))
        self.running_mean = Buffer(np.zeros(channels, np.float32))
        self.running_var = Buffer(np.ones(channels, np.float32))
        self.eps, self.momentum = eps, momentum
        self.reduce: Callable[[Array], Array] = alone

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            statistics = self.running_mean.data, self.running_var.data
            return ops.normalise_channels(x, *statistics, self.weight, self.bias, self.eps)
        y, mean, variance = ops.batch_norm(x, self.weight, self.bias, self.eps, self.reduce)
        if not is_replaying():  # a recomputed forward has been counted before
            self.running_mean.data = running_average(self.running_mean.data, mean.data, self.momentum)
            self.running_var.data = running_average(self.running_var.data, variance.data, self.momentum)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, momentum={self.momentum}"


class Conv2d(Module):
    """2-D convolution: (N, C, H, W) → (N, O, H', W'); weight (O, C/groups, kh, kw), bias (O,)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        if in_channels % groups or out_channels % groups:
            raise UsageError(
                f"Conv2d: {groups} groups must divide {in_channels} input and {out_channels} output channels"
            )
        size = pair(kernel)
        law = kaiming_uniform(in_channels // groups * size[0] * size[1])
        self.weight = Parameter((out_channels, in_channels // groups, *size), law)
        self.bias = Parameter((out_channels,), law) if bias else None
        self.stride, self.padding, self.dilation = pair(stride), pair(padding), pair(dilation)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        o, c, *size = self.weight.shape
        return f"{c * self.groups}, {o}, {tuple(size)}, stride={self.stride}, padding={self.padding}"


class MaxPool2d(Module):
    """Largest value of each window."""

    def __init__(self, kernel: Pair, stride: Pair | None = None, padding: Pair = 0):
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return ops.max_pool2d(x, self.kernel, self.stride, self.padding)


class AvgPool2d(Module):
    """Mean of each window."""

    def __init__(self, kernel: Pair, stride: Pair | None = None, padding: Pair = 0):
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return ops.avg_pool2d(x, self.kernel, self.stride, self.padding)


class GlobalAvgPool2d(Module):
    """Mean over all positions: (N, C, H, W) → (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(axis=(2, 3))


class Dropout(Module):
    """Zero elements with probability p while training; the mask is a function of position (see `random`).

    x is (N, ...), samples first. The mask's stream is named by the module's path in the model, so a module
    that is used twice in one step draws one mask twice: give each place its own.

    Attributes:
        window: returns (start, total) of axis 1 where the input is only a part of that axis; None: the whole.
    """

    def __init__(self, p: float = 0.5):
        if not 0 <= p < 1:
            raise UsageError(f"Dropout: p = {p} must lie in [0, 1)")
        self.p = p
        self.window: Callable[[], tuple[int, int]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        now = random.moment()
        key = random.stream(now.seed, now.step, self.path)
        if self.window is None:
            return ops.dropout(x, self.p, key, now.first_sample * math.prod(x.shape[1:]))
        start, total = self.window()
        inner = math.prod(x.shape[2:])
        starts = [((now.first_sample + i) * total + start) * inner for i in range(x.shape[0])]
        return ops.dropout(x, self.p, key, starts)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class GELU(Module):
    """Gaussian error linear unit; approximate is "none" (exact) or "tanh"."""

    def __init__(self, approximate: str = "none"):
        if approximate not in ("none", "tanh"):
            raise UsageError(f"GELU: approximate {approximate!r} is unknown: use none or tanh")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.tanh(x)


class SiLU(Module):
    """x · sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.silu(x)


class Flatten(Module):
    """Merge all axes after the first: (N, ...) → (N, product)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.flatten(x, 1)


class CrossEntropyLoss(Module):
    """Cross-entropy of logits (..., V) and integer targets (...), see `ops.cross_entropy`."""

    def __init__(self, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"):
        self.ignore_index, self.label_smoothing, self.reduction = ignore_index, label_smoothing, reduction

    def forward(self, logits: Tensor, targets: Any) -> Tensor:
        return ops.cross_entropy(logits, targets, self.ignore_index, self.label_smoothing, self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
