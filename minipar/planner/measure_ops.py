"""Seconds of single operations on this machine, forward and backward, over grids of sizes.

The very primitives that the models are made of are run, on every rank at the same time, since ranks of one
machine share its memory and its caches. The clock is the thread's own, which stands still while the machine
does something else, and of several repetitions the quickest counts.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipar import ops
from minipar.comm.interface import Communicator
from minipar.optim import AdamW, clip_grad_norm_, squared_norm
from minipar.planner.machine import Table
from minipar.tape import Backward
from minipar.tensor import Tensor

LARGEST = 3e8  # multiplications and additions of one measured product; larger ones are extrapolated
ENOUGH = 5e7  # of all products of one repetition
REPEATS = 5
SECONDS = 0.04  # after which a point is repeated no more, but twice at least
SPREAD = 2**24  # bytes of different inputs that a repetition goes through, as training does


@dataclass(frozen=True)
class Kind:
    """How one kind of operation is measured.

    Attributes:
        axes: the sizes it is measured over.
        make: sizes → a function that runs it once on fresh inputs and returns its output.
        flops: sizes → how large it is, for leaving out what takes too long.
        bytes: sizes → of its input.
    """

    axes: tuple[tuple[int, ...], ...]
    make: Callable[..., Callable[[], Tensor]]
    flops: Callable[..., float] = lambda *size: 0.0
    bytes: Callable[..., float] = lambda *size: 4.0 * math.prod(size)


def _values(*shape: int, dtype: Any) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def _input(*shape: int, dtype: Any) -> Tensor:
    return Tensor(_values(*shape, dtype=dtype), requires_grad=True)


def kinds(dtype: Any) -> dict[str, Kind]:
    """Return how each kind of `planner.work` is measured, in a precision."""

    def linear(rows: int, inputs: int, outputs: int) -> Callable[[], Tensor]:
        w, b = _input(outputs, inputs, dtype=dtype), _input(outputs, dtype=dtype)
        x = _input(rows, inputs, dtype=dtype)
        return lambda: ops.linear(x, w, b)

    def attention(heads: int, tokens: int, head_dim: int) -> Callable[[], Tensor]:
        x = _input(1, tokens, 3 * heads * head_dim, dtype=dtype)
        if heads % 4 == 0:  # as a batch of 4 heads a sample, the layout that models have
            x = _input(heads // 4, tokens, 12 * head_dim, dtype=dtype)
        return lambda: ops.self_attention(x, head_dim)

    def layer_norm(rows: int, width: int) -> Callable[[], Tensor]:
        x, w, b = (_input(*s, dtype=dtype) for s in ((rows, width), (width,), (width,)))
        return lambda: ops.layer_norm(x, w, b)

    def group_norm(samples: int, channels: int, size: int) -> Callable[[], Tensor]:
        x = _input(samples, channels, size, size, dtype=dtype)
        w, b = _input(channels, dtype=dtype), _input(channels, dtype=dtype)
        return lambda: ops.group_norm(x, min(8, channels), w, b)

    def elementwise(op: Callable[..., Tensor]) -> Callable[[int], Callable[[], Tensor]]:
        def make(elements: int) -> Callable[[], Tensor]:
            x = _input(elements, dtype=dtype)
            return lambda: op(x)

        return make

    def add(elements: int) -> Callable[[], Tensor]:
        x, y = _input(elements, dtype=dtype), _input(elements, dtype=dtype)
        return lambda: x + y

    def embedding(rows: int, vocabulary: int, width: int) -> Callable[[], Tensor]:
        w = _input(vocabulary, width, dtype=dtype)
        ids = np.random.default_rng(0).integers(0, vocabulary, rows)
        return lambda: ops.embedding(w, ids)

    def cross_entropy(rows: int, classes: int) -> Callable[[], Tensor]:
        x = _input(rows, classes, dtype=dtype)
        targets = np.random.default_rng(0).integers(0, classes, rows)
        return lambda: ops.cross_entropy(x, targets, reduction="sum")

    def conv(kernel: int, stride: int) -> Callable[..., Callable[[], Tensor]]:
        def make(samples: int, channels: int, outputs: int, size: int) -> Callable[[], Tensor]:
            x = _input(samples, channels, size, size, dtype=dtype)
            w = _input(outputs, channels, kernel, kernel, dtype=dtype)
            return lambda: ops.conv2d(x, w, stride=stride, padding=kernel // 2)

        return make

    def conv_flops(kernel: int, stride: int) -> Callable[..., float]:
        return lambda n, c, o, s: 2.0 * n * c * o * (kernel * s / stride) ** 2

    def pool(samples: int, channels: int, size: int) -> Callable[[], Tensor]:
        x = _input(samples, channels, size, size, dtype=dtype)
        return lambda: x.mean(axis=(2, 3))

    lengths = (100, 2_000, 20_000, 200_000, 2_000_000)
    image = lambda n, c, o, s: 4.0 * n * c * s * s
    return {
        "linear": Kind(
            ((16, 64, 256, 1024, 4096), (32, 128, 512, 2048), (32, 128, 512, 2048)), linear,
            lambda r, i, o: 2.0 * r * i * o, lambda r, i, o: 4.0 * r * i,
        ),
        "attention": Kind(
            ((4, 32, 256), (16, 64, 256), (16, 32, 64)), attention,
            lambda h, t, d: 4.0 * h * t * t * d, lambda h, t, d: 4.0 * h * t * (3 * d + t),
        ),
        "layer_norm": Kind(((16, 256, 2048, 16384), (32, 128, 512)), layer_norm),
        "group_norm": Kind(((4, 64), (16, 64), (4, 8, 32)), group_norm, bytes=lambda n, c, s: 4.0 * n * c * s * s),
        "gelu": Kind((lengths,), elementwise(ops.gelu)),
        "relu": Kind((lengths,), elementwise(ops.relu)),
        "add": Kind((lengths,), add),
        "embedding": Kind(
            ((16, 256, 4096), (64, 1024), (32, 128, 512)), embedding, bytes=lambda r, v, w: 4.0 * r * w
        ),
        "cross_entropy": Kind(((8, 128, 2048), (10, 96, 1024)), cross_entropy),
        "conv3s1": Kind(((4, 16, 64), (1, 16, 64), (8, 16, 32, 64), (4, 8, 32)), conv(3, 1), conv_flops(3, 1), image),
        "conv3s2": Kind(((4, 16, 64), (16, 64), (16, 32, 128), (4, 8, 32)), conv(3, 2), conv_flops(3, 2), image),
        "conv1s2": Kind(((4, 16, 64), (16, 64), (16, 32, 128), (4, 8, 32)), conv(1, 2), conv_flops(1, 2), image),
        "global_pool": Kind(((4, 64), (8, 128), (4, 16)), pool, bytes=lambda n, c, s: 4.0 * n * c * s * s),
    }  # fmt: skip


def once(makes: list[Callable[[], Tensor]]) -> tuple[float, float]:
    """Return the seconds of forward and of backward of some operations, run one after another in one tape."""
    start = time.thread_time()
    outputs = [make() for make in makes]
    middle = time.thread_time()
    run = Backward()
    for y in outputs:
        edge = y.edge()
        assert edge is not None
        run.push(edge, np.ones_like(y.data))
    begin = time.thread_time()
    run.carry_out(run.run)
    end = time.thread_time()
    return middle - start, end - begin


def measure_kind(kind: Kind, comm: Communicator) -> Table:
    """Return the table of one kind of operation, all ranks working at once; the same on every rank.

    What is too large to be measured is taken from the next smaller point, with time in proportion to work.
    """
    shape = tuple(len(axis) for axis in kind.axes)
    times: Any = np.zeros((2, *shape))
    for place in itertools.product(*(range(n) for n in shape)):
        size = tuple(axis[i] for axis, i in zip(kind.axes, place))
        if kind.flops(*size) > LARGEST:
            axis = max((a for a in range(len(size)) if place[a]), key=lambda a: size[a])
            before = tuple(i - (a == axis) for a, i in enumerate(place))
            smaller = tuple(ax[i] for ax, i in zip(kind.axes, before))
            times[:, *place] = times[:, *before] * kind.flops(*size) / kind.flops(*smaller)
            continue
        room = min(SPREAD / kind.bytes(*size), ENOUGH / max(kind.flops(*size), 1.0), 8)
        count = max(int(room), 1)
        makes = [kind.make(*size) for _ in range(count)]
        comm.barrier()
        found: list[tuple[float, float]] = []
        start = time.thread_time()
        while len(found) < 2 or (len(found) < REPEATS and time.thread_time() - start < SECONDS):
            found.append(once(makes))
        times[:, *place] = np.min(found, axis=0) / count
    times = comm.all_reduce(times) / comm.size
    return Table(tuple(tuple(map(float, axis)) for axis in kind.axes), times[0].tolist(), times[1].tolist())


def measure_updates(comm: Communicator, dtype: Any) -> dict[str, Table]:
    """Return the tables of AdamW's step, of clipping, and of adding up gradients, over elements of a tensor."""
    sizes = (16, 1_000, 16_000, 250_000, 4_000_000)
    rows: dict[str, list[float]] = {"adamw": [], "clip": [], "accumulate": []}
    for n in sizes:
        count = int(min(max(SPREAD / (16 * n), 1), 8))
        tensors = [_input(n, dtype=dtype) for _ in range(count)]
        for t in tensors:
            t.grad = _values(n, dtype=dtype)
        optimizer = AdamW(tensors)
        more = [_values(n, dtype=dtype) for _ in range(count)]
        best = dict.fromkeys(rows, math.inf)
        comm.barrier()
        for _ in range(REPEATS + 1):  # the first makes the moments
            marks = [time.thread_time()]
            optimizer.step()
            marks.append(time.thread_time())
            clip_grad_norm_(tensors, 1e-3, math.sqrt(squared_norm(t.grad for t in tensors)))
            marks.append(time.thread_time())
            for t, g in zip(tensors, more):
                t.grad += g
            marks.append(time.thread_time())
            for name, a, b in zip(rows, marks, marks[1:]):
                best[name] = min(best[name], (b - a) / count)
        for name in rows:
            rows[name].append(best[name])
    axes = (tuple(map(float, sizes)),)
    means = {name: (comm.all_reduce(np.array(row)) / comm.size).tolist() for name, row in rows.items()}
    return {name: Table(axes, row, row) for name, row in means.items()}


def measure_bandwidth(comm: Communicator) -> float:
    """Return the bytes a second that one rank reads and writes while all do: a copy of 64 MiB."""
    x = np.ones(2**23)
    y = np.empty_like(x)
    best = math.inf
    comm.barrier()
    for _ in range(REPEATS):
        start = time.thread_time()
        np.copyto(y, x)
        best = min(best, time.thread_time() - start)
    return float(comm.all_reduce(np.array([2 * x.nbytes / best]))[0]) / comm.size
