"""SGD and Adam steps as plain formulas, in place, in PyTorch's order of operations."""

from __future__ import annotations

import math

from minipar.backend import array_module
from minipar.kernels.common import Array


def sgd_step_(
    p: Array,
    g: Array,
    buf: Array | None,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    first: bool,
) -> None:
    """One SGD step on p and its momentum buffer, in place, in PyTorch's order of operations.

    `first` starts the buffer as the gradient itself (undampened), as PyTorch does. `buf` may be None when
    `momentum` is 0.
    """
    g = g.astype(p.dtype, copy=False)
    if weight_decay:
        g = g + weight_decay * p
    if momentum and buf is not None:
        buf[...] = g if first else momentum * buf + (1 - dampening) * g
        g = g + momentum * buf if nesterov else buf
    p -= lr * g


def adam_step_(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
) -> None:
    """One step of Adam (Kingma & Ba 2015) or, `decoupled`, AdamW (Loshchilov & Hutter 2019), in place.

    `step` counts from 1. PyTorch's order of operations; the bias corrections are float64 scalars.
    """
    g = g.astype(p.dtype, copy=False)
    if weight_decay and decoupled:
        p *= 1 - lr * weight_decay
    elif weight_decay:
        g = g + weight_decay * p
    m += (1 - beta1) * (g - m)
    v *= beta2
    v += (1 - beta2) * g * g
    denominator = array_module(p).sqrt(v) / math.sqrt(1 - beta2**step) + eps
    p -= lr / (1 - beta1**step) * m / denominator
