"""Convolution over ranks, cut in three ways: by output channel, by input channel, by image region.

    output channels   every rank sees the whole image and computes some channels; they are joined
    input channels    every rank sees some channels and computes a term of every output; the terms are summed
    image region      every rank holds some rows of the image; at the cuts a convolution needs its neighbours'
                      rows, the *halo*, which are exchanged before it

The first two cut the weight, the third cuts the activation (Dryden et al. 2019, "Improving strong-scaling of
CNN training by exploiting finer-grained parallelism").
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from minipar import ops
from minipar.backend import Array, array_module
from minipar.comm.differentiable import copy_to, exchange, gather, reduce_from, scatter
from minipar.comm.interface import Communicator, balanced
from minipar.errors import UsageError
from minipar.nn import AvgPool2d, Conv2d, GlobalAvgPool2d, GroupNorm, MaxPool2d
from minipar.ops.conv import Pair, output_size, pair
from minipar.parallel.placement import Shard
from minipar.parallel.tensor_parallel.parallelize import Style, around
from minipar.tensor import Tensor, primitive

CHANNELS, ROWS = 1, 2  # axes of (N, C, H, W)


class _ByChannel(Style):
    kind = Conv2d

    def check(self, module: Any, name: str) -> None:
        if module.groups != 1:
            outputs, inputs = module.weight.global_shape[0], module.weight.global_shape[1] * module.groups
            raise UsageError(
                f"{name}, {inputs} to {outputs} channels in {module.groups} groups, is not offered cut by"
                " channel; groups=1 would do on any number of ranks, and so would the cut by region"
            )


@dataclass(frozen=True)
class OutputChannels(_ByChannel):
    """x (N, C, H, W) whole → (N, O, H', W') whole; weight Shard(0), bias Shard(0)."""

    def cuts(self, module: Any) -> dict[str, Shard]:
        return {"weight": Shard(0)} if module.bias is None else {"weight": Shard(0), "bias": Shard(0)}

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        counts = module.weight.layout.counts(module.weight.global_shape)
        around(module, lambda x: copy_to(x, comm), lambda y: gather(y, comm, CHANNELS, counts))


@dataclass(frozen=True)
class InputChannels(_ByChannel):
    """x (N, C, H, W) whole → (N, O, H', W') whole; weight Shard(1), bias whole, added once."""

    def cuts(self, module: Any) -> dict[str, Shard]:
        return {"weight": Shard(1)}

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        counts = module.weight.layout.counts(module.weight.global_shape)

        def forward(x: Tensor) -> Tensor:
            part = scatter(x, comm, CHANNELS, counts)
            window = module.stride, module.padding, module.dilation
            y = reduce_from(ops.conv2d(part, module.weight, None, *window, unrounded=True), comm)
            if module.bias is not None:
                y = y + ops.rounded(module.bias, module.weight).reshape(1, -1, 1, 1)
            return ops.rounded(y, module.weight)

        module.forward = forward


Interval = tuple[int, int]


def intervals(length: int, ranks: int) -> list[Interval]:
    """Return the rows [start, stop) that each rank holds of an image with `length` rows."""
    counts = balanced(length, ranks)
    return [(sum(counts[:r]), sum(counts[: r + 1])) for r in range(ranks)]


def needed(
    out: Interval, length: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[Interval, Interval]:
    """Return which input rows the output rows `out` read, and the rows of padding before and after them.

    In global numbers: output row o reads the rows o·stride - padding + i·dilation, i = 0 … kernel - 1. What
    lies outside [0, length) is padding; the inside is what must be here before the convolution.
    """
    if out[0] == out[1]:
        return (0, 0), (0, 0)
    start = out[0] * stride - padding
    stop = (out[1] - 1) * stride - padding + dilation * (kernel - 1) + 1
    inside = min(max(start, 0), length), max(min(stop, length), 0)
    return inside, (max(min(stop, 0) - start, 0), max(stop - max(start, length), 0))


def overlap(a: Interval, b: Interval) -> Interval:
    """Return the common part of two intervals, relative to a's start; empty as (0, 0)."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start - a[0], stop - a[0]) if start < stop else (0, 0)


class ImageHeight:
    """The height of the images that are in a model, noted by `RegionScatter` and read by a plan's other styles.

    The note lives in the context, as `SequenceLength`'s: each rank-thread has its own, and a recomputed block
    sees that of its own forward. It says whose it is: the note of another model is none of this plan's.
    """

    @property
    def rows(self) -> int:
        """The rows of the images at hand; 0 if they did not come in through this plan's `RegionScatter`."""
        whose, rows = _entered.get()
        return rows if whose is self else 0

    @rows.setter
    def rows(self, rows: int) -> None:
        _entered.set((self, rows))


_entered: ContextVar[tuple[ImageHeight | None, int]] = ContextVar("image_height", default=(None, 0))


class RowCount:
    """How many rows the whole image has at a module, which no rank can tell from its part.

    It is the sum of the ranks' rows. Once found it is remembered for each height of the model's input, so all
    ranks remember alike; without a plan's note of that height it is found anew each time.
    """

    def __init__(self, comm: Communicator, name: str, image: ImageHeight | None):
        self.comm, self.name, self.image = comm, name, image
        self.known: dict[int, int] = {}

    def __call__(self, x: Tensor) -> int:
        entered, here = self.image.rows if self.image is not None else 0, x.shape[ROWS]
        rows = self.known.get(entered)
        if rows is None:
            rows = int(self.comm.all_reduce(np.array([here]))[0])
            if entered:
                self.known[entered] = rows
        expected = balanced(rows, self.comm.size)[self.comm.rank]
        if here != expected:
            raise UsageError(
                f"{self.name}: rank {self.comm.rank} has {here} rows, not {expected} of the image's {rows}"
            )
        return rows


@dataclass(frozen=True)
class RegionScatter(Style):
    """Each rank takes its rows of this module's input: (N, C, H, W) → (N, C, H/ranks, W).

    Args:
        image: given to all styles of a plan, it spares them counting the same image's rows again.
    """

    image: ImageHeight | None = None

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        def enter(x: Tensor) -> Tensor:
            if self.image is not None:
                self.image.rows = x.shape[ROWS]
            return scatter(x, comm, ROWS)

        around(module, enter)


class Window:
    """A window that slides over an image cut by rows: fetches what it reads of other ranks' rows, the halo.

    Args:
        size, stride, padding, dilation: (vertical, horizontal).
        fill: what padding is made of.
        image: see `RegionScatter`.
    """

    def __init__(
        self, comm: Communicator, name: str, size: Pair, stride: Pair, padding: Pair, dilation: Pair = 1,
        fill: float = 0.0, image: ImageHeight | None = None,
    ):  # fmt: skip
        self.comm, self.rows, self.fill = comm, RowCount(comm, name, image), fill
        self.name, self.shape = name, (pair(size), pair(stride), pair(padding), pair(dilation))

    def __call__(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the rows that this rank's outputs read, with their padding, and the outputs' (H', W')."""
        comm, length = self.comm, self.rows(x)
        size, stride, padding, dilation = self.shape
        height, width = output_size(self.name, (*x.shape[:2], length, x.shape[3]), *self.shape)
        held, produced = intervals(length, comm.size), intervals(height, comm.size)
        wanted = [needed(out, length, size[0], stride[0], padding[0], dilation[0]) for out in produced]
        mine, (above, below) = wanted[comm.rank]
        give = [overlap(held[comm.rank], rows) for rows, _ in wanted]
        take = [stop - start for start, stop in (overlap(mine, rows) for rows in held)]
        inside = exchange(x, comm, ROWS, give, take)  # (N, C, rows + halo, W)
        first, last = produced[comm.rank]
        if above or below:
            inside = ops.pad(inside, ((0, 0), (0, 0), (above, below), (0, 0)), self.fill)
        return inside, (last - first, width)


@primitive(fresh=True, precision="low")
def _no_rows(x, weight, bias, shape):
    """An output without rows that still hangs on x and the weights, so that backward communicates."""
    xp = array_module(x)
    like = [None if a is None else (a.shape, a.dtype) for a in (x, weight, bias)]
    return xp.zeros(shape, dtype=x.dtype), lambda g: (*(a and xp.zeros(*a) for a in like), None)


@dataclass(frozen=True)
class RegionConv(Style):
    """Convolution of rows: fetch the halo, convolve own output rows; weights whole, gradients summed."""

    image: ImageHeight | None = None
    kind = Conv2d

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        size = module.weight.global_shape[2:]
        window = Window(comm, name, size, module.stride, module.padding, module.dilation, image=self.image)

        def forward(x: Tensor) -> Tensor:
            rows, (height, width) = window(x)
            weight = copy_to(module.weight, comm)
            bias = None if module.bias is None else copy_to(module.bias, comm)
            if height == 0:  # no output row is this rank's
                return _no_rows(rows, weight, bias, (x.shape[0], weight.shape[0], 0, width))
            padding = (0, module.padding[1])
            return ops.conv2d(rows, weight, bias, module.stride, padding, module.dilation, module.groups)

        module.forward = forward


@dataclass(frozen=True)
class _RegionWindowPool(Style):
    image: ImageHeight | None = None
    pool: ClassVar[Callable[..., Tensor]]
    fill: ClassVar[float] = 0.0

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        stride = module.kernel if module.stride is None else module.stride
        window = Window(comm, name, module.kernel, stride, module.padding, fill=self.fill, image=self.image)

        def forward(x: Tensor) -> Tensor:
            rows, (height, width) = window(x)
            if height == 0:
                return _no_rows(rows, None, None, (*x.shape[:2], 0, width))
            return type(self).pool(rows, module.kernel, stride, (0, pair(module.padding)[1]))

        module.forward = forward


@dataclass(frozen=True)
class RegionMaxPool(_RegionWindowPool):
    """Largest value of each window of an image cut by rows."""

    kind, pool, fill = MaxPool2d, ops.max_pool2d, -np.inf


@dataclass(frozen=True)
class RegionAvgPool(_RegionWindowPool):
    """Mean of each window of an image cut by rows, padding counted."""

    kind, pool = AvgPool2d, ops.avg_pool2d


@dataclass(frozen=True)
class RegionGroupNorm(Style):
    """Group norm of an image cut by rows: mean and variance are those of all ranks' rows."""

    image: ImageHeight | None = None
    kind = GroupNorm

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        rows = RowCount(comm, name, self.image)

        def forward(x: Tensor) -> Tensor:
            weight, bias = copy_to(module.weight, comm), copy_to(module.bias, comm)
            return _group_norm(x, weight, bias, comm, module.groups, module.eps, rows(x))

        module.forward = forward


@primitive(fresh=True, precision="float32")
def _group_norm(x, weight, bias, comm, groups, eps, height):
    """`ops.group_norm` of an image of which x (N, C, H/ranks, W) is this rank's part and `height` is H.

    Two all-reduces forward, of N·groups sums each; one backward, of twice that.
    """
    xp, given = array_module(x), x.dtype
    n, c, _, w = x.shape
    wide = "float32" if given == "float16" else given  # sums over an image overflow float16
    rows = x.astype(wide, copy=False).reshape(n, groups, x.size // max(n * groups, 1))
    elements = c // groups * height * w
    mean = comm.all_reduce(rows.sum(axis=2, keepdims=True)) / elements  # (N, G, 1)
    normal = rows - mean
    variance = comm.all_reduce((normal * normal).sum(axis=2, keepdims=True)) / elements
    rstd = 1 / xp.sqrt(variance + variance.dtype.type(eps))
    normal *= rstd
    xhat = normal.reshape(x.shape)
    scale, shift = (p.astype(wide, copy=False).reshape(1, c, 1, 1) for p in (weight, bias))

    def vjp(g: Array) -> Any:
        dy = (g * scale).reshape(rows.shape)
        sums = comm.all_reduce(xp.stack([dy.sum(axis=2), (dy * normal).sum(axis=2)])) / elements  # (2, N, G)
        dx = rstd * (dy - sums[0, :, :, None] - normal * sums[1, :, :, None])
        others = (0, 2, 3)
        gradients = dx.reshape(xhat.shape), (g * xhat).sum(axis=others), g.sum(axis=others)
        return (*gradients, None, None, None, None)

    return (xhat * scale + shift).astype(given, copy=False), vjp


@dataclass(frozen=True)
class RegionPool(Style):
    """Mean over all positions of an image cut by rows: (N, C, H/ranks, W) → (N, C) whole on every rank."""

    image: ImageHeight | None = None
    kind = GlobalAvgPool2d

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        rows = RowCount(comm, name, self.image)

        def forward(x: Tensor) -> Tensor:
            positions = rows(x) * x.shape[3]
            return reduce_from(x.sum(axis=(2, 3)), comm) / positions

        module.forward = forward


CONVOLUTION_CUTS: dict[str, type[Style]] = {
    "output": OutputChannels,
    "input": InputChannels,
    "region": RegionConv,
}
