"""Convolution over ranks, cut in three ways: by output channel, by input channel, by image region.

    output channels   every rank sees the whole image and computes some channels; they are joined
    input channels    every rank sees some channels and computes a term of every output; the terms are summed
    image region      every rank holds some rows of the image; at the cuts a convolution needs its neighbours'
                      rows, the *halo*, which are exchanged before it

The first two cut the weight, the third cuts the activation (Dryden et al. 2019, "Improving strong-scaling of
CNN training by exploiting finer-grained parallelism").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minipar import ops
from minipar.backend import array_module
from minipar.comm.differentiable import copy_to, exchange, gather, reduce_from, scatter
from minipar.comm.interface import Communicator, balanced
from minipar.errors import UsageError
from minipar.nn import Conv2d, GlobalAvgPool2d, GroupNorm
from minipar.parallel.placement import Shard, place
from minipar.parallel.tensor_parallel import Style, around
from minipar.tensor import Tensor

CHANNELS, ROWS = 1, 2  # axes of (N, C, H, W)


def _ungrouped(module: Any, name: str) -> None:
    if module.groups != 1:
        raise UsageError(f"{name}: a convolution in {module.groups} groups is not offered cut by channel; use groups=1")


@dataclass(frozen=True)
class OutputChannels(Style):
    """x (N, C, H, W) whole → (N, O, H', W') whole; weight Shard(0), bias Shard(0)."""

    kind = Conv2d

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        _ungrouped(module, name)
        place(module.weight, f"{name}.weight", Shard(0), comm)
        if module.bias is not None:
            place(module.bias, f"{name}.bias", Shard(0), comm)
        counts = module.weight.layout.counts(module.weight.global_shape)
        around(module, lambda x: copy_to(x, comm), lambda y: gather(y, comm, CHANNELS, counts))


@dataclass(frozen=True)
class InputChannels(Style):
    """x (N, C, H, W) whole → (N, O, H', W') whole; weight Shard(1), bias whole, added once."""

    kind = Conv2d

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        _ungrouped(module, name)
        place(module.weight, f"{name}.weight", Shard(1), comm)
        counts = module.weight.layout.counts(module.weight.global_shape)

        def forward(x: Tensor) -> Tensor:
            part = scatter(x, comm, CHANNELS, counts)
            window = module.stride, module.padding, module.dilation
            y = reduce_from(ops.conv2d(part, module.weight, None, *window), comm)
            return y if module.bias is None else y + module.bias.reshape(1, -1, 1, 1)

        module.forward = forward


Interval = tuple[int, int]


def intervals(length: int, ranks: int) -> list[Interval]:
    """Return the rows [start, stop) that each rank holds of an image with `length` rows."""
    counts = balanced(length, ranks)
    return [(sum(counts[:r]), sum(counts[: r + 1])) for r in range(ranks)]


def needed(out: Interval, length: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[Interval, Interval]:
    """Return which input rows the output rows `out` read, and the rows of padding before and after them.

    In global numbers: output row o reads the rows o·stride - padding + i·dilation, i = 0 … kernel - 1. What
    lies outside [0, length) is padding; the inside is what must be here before the convolution.
    """
    if out[0] == out[1]:
        return (0, 0), (0, 0)
    start = out[0] * stride - padding
    stop = (out[1] - 1) * stride - padding + dilation * (kernel - 1) + 1
    inside = min(max(start, 0), length), max(min(stop, length), 0)
    return inside, (max(-start, 0), max(stop - length, 0))


def overlap(a: Interval, b: Interval) -> Interval:
    """Return the common part of two intervals, relative to a's start; empty as (0, 0)."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start - a[0], stop - a[0]) if start < stop else (0, 0)


class RowCount:
    """How many rows the whole image has at each module, found once: the sum of all ranks' rows."""

    def __init__(self, comm: Communicator, name: str):
        self.comm, self.name, self.length, self.local = comm, name, 0, -1

    def __call__(self, x: Tensor) -> int:
        if self.local < 0:
            self.local = x.shape[ROWS]
            self.length = sum(self.comm.all_gather_object(self.local))
        if x.shape[ROWS] != self.local:
            raise UsageError(f"{self.name}: {x.shape[ROWS]} rows on this rank, {self.local} before; image sizes cannot change")
        return self.length


@dataclass(frozen=True)
class RegionScatter(Style):
    """This module's input is the whole image on every rank; each takes its rows: (N, C, H, W) → (N, C, H/ranks, W)."""

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        around(module, enter=lambda x: scatter(x, comm, ROWS))


@dataclass(frozen=True)
class RegionConv(Style):
    """Convolution of rows: fetch the halo, convolve, keep own output rows. Weights whole, gradients summed."""

    kind = Conv2d

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        rows = RowCount(comm, name)
        (kernel, _), (stride, _), (dilation, _) = module.weight.global_shape[2:], module.stride, module.dilation
        padding, width_padding = module.padding

        def forward(x: Tensor) -> Tensor:
            length = rows(x)
            out_length = (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            held, produced = intervals(length, comm.size), intervals(out_length, comm.size)
            wanted = [needed(out, length, kernel, stride, padding, dilation) for out in produced]
            mine, (above, below) = wanted[comm.rank]
            give = [overlap(held[comm.rank], want) for want, _ in wanted]
            take = [b - a for a, b in (overlap(mine, have) for have in held)]
            with_halo = exchange(x, comm, ROWS, give, take)  # (N, C, rows + halo, W)
            padded = ops.pad(with_halo, ((0, 0), (0, 0), (above, below), (0, 0)))
            weight = copy_to(module.weight, comm)
            bias = None if module.bias is None else copy_to(module.bias, comm)
            first, last = produced[comm.rank]
            if first == last:  # no output row is this rank's: an empty image, still tied to x and the weights
                return _no_rows(padded, weight, bias, module, width_padding)
            return ops.conv2d(padded, weight, bias, module.stride, (0, width_padding), module.dilation, module.groups)

        module.forward = forward


def _no_rows(x: Tensor, weight: Tensor, bias: Tensor | None, module: Any, width_padding: int) -> Tensor:
    """Return the convolution of an image without rows: (N, O, 0, W'), on the tape so that backward communicates."""
    w = x.shape[3] + 2 * width_padding - module.dilation[1] * (weight.shape[3] - 1) - 1
    shape = (x.shape[0], weight.shape[0], 0, w // module.stride[1] + 1)
    zero = x.sum() * 0 + weight.sum() * 0
    if bias is not None:
        zero = zero + bias.sum() * 0
    return ops.broadcast_to(zero.reshape(1, 1, 1, 1), (*shape[:2], 1, shape[3]))[:, :, :0]


@dataclass(frozen=True)
class RegionGroupNorm(Style):
    """Group norm of an image cut by rows: mean and variance are those of all ranks' rows."""

    kind = GroupNorm

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        def over_ranks(x: Tensor) -> Tensor:
            # Every rank adds a term and every rank uses the sum, so both directions sum.
            return copy_to(reduce_from(x, comm), comm)

        def forward(x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            rows = x.reshape(n, module.groups, c // module.groups * h * w)
            elements = float(comm.all_reduce(_one(x, rows.shape[2]))[0])
            mean = over_ranks(rows.sum(axis=2, keepdims=True)) / elements  # (N, G, 1)
            centred = rows - mean
            variance = over_ranks((centred * centred).sum(axis=2, keepdims=True)) / elements
            normal = (centred / (variance + module.eps).sqrt()).reshape(n, c, h, w)
            weight, bias = (copy_to(p, comm).reshape(1, c, 1, 1) for p in (module.weight, module.bias))
            return normal * weight + bias

        module.forward = forward


@dataclass(frozen=True)
class RegionPool(Style):
    """Mean over all positions of an image cut by rows: (N, C, H/ranks, W) → (N, C) whole on every rank."""

    kind = GlobalAvgPool2d

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        def forward(x: Tensor) -> Tensor:
            positions = float(comm.all_reduce(_one(x, x.shape[2] * x.shape[3]))[0])
            return reduce_from(x.sum(axis=(2, 3)), comm) / positions

        module.forward = forward


def _one(x: Tensor, value: int) -> Any:
    """Return `value` as an array (1,) float64 where x lies, to be summed over ranks."""
    return array_module(x.data).asarray([value], dtype="float64")


CONVOLUTION_CUTS: dict[str, type[Style]] = {
    "output": OutputChannels,
    "input": InputChannels,
    "region": RegionConv,
}
