"""Softmax and the norms, each fused into one primitive with its gradient derived by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipar import kernels
from minipar.backend import Array, array_module
from minipar.tensor import Handle, primitive


def _values(weight: Handle | None) -> Array | None:
    """The array behind a handle: read where it is used, so that a weight may be freed until backward."""
    return None if weight is None else weight.data


def _check_channels(name: str, channels: int, **parameters: Array | None) -> None:
    """Refuse a weight or bias that is not (C,): a single number would broadcast without a sign."""
    for key, value in parameters.items():
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name}: {key} must be ({channels},), one per channel, got {value.shape}")


@primitive(fresh=True, precision="float32")
def softmax(x, axis=-1):
    """exp(x) over its sum along `axis`; a row that is all -inf gives zeros."""
    k = kernels.of(x)
    y = k.softmax(x, axis)
    return y, lambda g: (k.softmax_backward(g, y, axis), None)


@primitive(fresh=True, precision="float32")
def log_softmax(x, axis=-1):
    """x minus its logsumexp along `axis`."""
    k = kernels.of(x)
    y = k.log_softmax(x, axis)
    return y, lambda g: (k.log_softmax_backward(g, y, axis), None)


@primitive(handles=("weight",), fresh=True, precision="float32")
def layer_norm(x, weight=None, bias=None, eps=1e-5):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift (Ba, Kiros, Hinton 2016).

    x (..., C), weight and bias (C,) or None → (..., C).
    """
    _check_channels("layer_norm", x.shape[-1], weight=_values(weight), bias=bias)
    k = kernels.of(x)
    y, mean, rstd = k.layer_norm(x, _values(weight), bias, eps)
    return y, lambda g: k.layer_norm_backward(g, x, mean, rstd, _values(weight))


@primitive(handles=("weight",), fresh=True, precision="float32")
def rms_norm(x, weight=None, eps=1e-6):
    """Divide the last axis by its root mean square, then scale (Zhang and Sennrich 2019).

    x (..., C), weight (C,) or None → (..., C).
    """
    _check_channels("rms_norm", x.shape[-1], weight=_values(weight))
    k = kernels.of(x)
    y, rstd = k.rms_norm(x, _values(weight), eps)
    return y, lambda g: k.rms_norm_backward(g, x, rstd, _values(weight))


@primitive(handles=("weight",), fresh=True, precision="float32")
def group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    """Normalise each sample over each of `groups` groups of channels (Wu and He 2018).

    x (N, C, *), weight and bias (C,) or None → (N, C, *). No sample sees another, so it equals serial
    training under any split of the batch.

    Raises:
        ValueError: `groups` does not divide C.
    """
    c = x.shape[1]
    if groups < 1 or c % groups:
        raise ValueError(f"group_norm: {groups} groups do not divide {c} channels")
    _check_channels("group_norm", c, weight=_values(weight), bias=bias)
    k = kernels.of(x)
    y, mean, rstd = k.group_norm(x, groups, _values(weight), bias, eps)
    has_bias = bias is not None  # bias itself, held until backward, would keep a gathered parameter alive

    def vjp(g: Array) -> Any:
        dx, dweight, dbias = k.group_norm_backward(g, x, mean, rstd, _values(weight))
        return dx, None, dweight, dbias if has_bias else None

    return y, vjp


def alone(sums: Array) -> Array:
    """The sum over a single rank: what batch norm's `reduce` is until the batch is spread over several."""
    return sums


@primitive(handles=("weight",), fresh=True, precision="float32")
def batch_norm(x, weight=None, bias=None, eps=1e-5, reduce: Callable[[Array], Array] = alone):
    """Normalise each channel over the batch and all positions (Ioffe and Szegedy 2015), training form.

    x (N, C, *), weight and bias (C,) or None → (y (N, C, *), mean (C,), variance (C,)), the last two
    without gradient, for the running statistics: the variance there has divisor n - 1, as PyTorch's.

    Args:
        reduce: sums an array over the ranks that share the batch; the statistics, forward and backward, are
            then those of the whole batch. The default is a single rank.

    Raises:
        ValueError: one value per channel in the whole batch, which has no variance.
    """
    _check_channels("batch_norm", x.shape[1], weight=_values(weight), bias=bias)
    xp, given = array_module(x), x.dtype
    x = x.astype("float32") if given == "float16" else x  # sums over a batch overflow float16
    axes = (0, *range(2, x.ndim))
    c = x.shape[1]
    channel = (1, c) + (1,) * (x.ndim - 2)
    sums = reduce(xp.concatenate([x.sum(axis=axes), xp.full(1, x.size // c, dtype=x.dtype)]))  # (C + 1,)
    count = sums[-1]
    if count < 2:
        raise ValueError(f"batch_norm: {int(count)} value per channel has no variance; use a larger batch")
    mean = sums[:-1] / count
    centred = x - mean.reshape(channel)
    variance = reduce((centred * centred).sum(axis=axes)) / count
    rstd = 1 / xp.sqrt(variance + x.dtype.type(eps))
    xhat = centred * rstd.reshape(channel)
    y = xhat if weight is None else xhat * weight.data.reshape(channel)
    y = y if bias is None else y + bias.reshape(channel)

    def vjp(gs: list[Array | None]) -> Any:
        g = gs[0]
        if g is None:  # only the statistics were used, and those carry no gradient
            return None, None, None
        dbias, dweight = g.sum(axis=axes), (g * xhat).sum(axis=axes)  # this rank's share
        total = reduce(xp.concatenate([dbias, dweight])) / count  # (2C,)
        from_mean, from_variance = total[:c].reshape(channel), total[c:].reshape(channel)
        scale = rstd if weight is None else rstd * weight.data
        return (g - from_mean - xhat * from_variance) * scale.reshape(channel), dweight, dbias

    outputs = y, mean, variance * (count / (count - 1))
    return tuple([v.astype(given, copy=False) for v in outputs]), vjp


@primitive(fresh=True, precision="float32")
def normalise_channels(x, mean, variance, weight=None, bias=None, eps=1e-5):
    """Batch norm's evaluation form: given statistics (C,), no sample sees another. x (N, C, *) → same."""
    _check_channels("normalise_channels", x.shape[1], mean=mean, variance=variance, weight=weight, bias=bias)
    xp = array_module(x)
    channel = (1, x.shape[1]) + (1,) * (x.ndim - 2)
    rstd = (1 / xp.sqrt(variance + eps)).astype(x.dtype)
    xhat = (x - mean.reshape(channel)) * rstd.reshape(channel)
    y = xhat if weight is None else xhat * weight.reshape(channel)
    y = y if bias is None else y + bias.reshape(channel)
    axes = (0, *range(2, x.ndim))
    scale = rstd if weight is None else rstd * weight
    return y.astype(x.dtype, copy=False), lambda g: (
        g * scale.reshape(channel),
        None,
        None,
        lambda: (g * xhat).sum(axis=axes),
        lambda: g.sum(axis=axes),
    )


def running_average(old: Array, new: Array, momentum: float) -> Array:
    """(1 - momentum) · old + momentum · new, in old's dtype: the update of running statistics."""
    return ((1 - momentum) * old + momentum * new).astype(old.dtype)
