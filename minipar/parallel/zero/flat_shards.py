"""The flat layout of ZeRO: a unit's parameters one after another in one array, cut into equal ranges.

        unit       | w (3, 5)         | b (3,) |··|     18 elements and 2 of padding
        rank       |  0  |  1  |  2  |  3  |            5 elements each, whatever the shapes

Rank r owns range r: those elements' values, summed gradients and optimizer state. Because ranges pay no heed
to shapes, every rank owns the same number of elements, whatever the model. Rajbhandari et al. 2020, "ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from minipar import random
from minipar.backend import Array, array_module, to_device
from minipar.errors import UsageError
from minipar.kernels.common import work_dtype
from minipar.nn import Parameter
from minipar.tensor import Tensor

BLOCK = 2**18  # elements initialised at a time: what drawing needs beside the result stays small


class Piece(NamedTuple):
    """What one rank owns of one parameter.

    Attributes:
        param: the parameter.
        tensor: (n,) the owned values, a view of the rank's range; its `.grad` likewise. What optimizers see.
        start: the first owned element, counted in the parameter's own flat order.
        place: where the elements lie in the rank's range.
    """

    param: Parameter
    tensor: Tensor
    start: int
    place: slice


class FlatUnit:
    """The parameters that are gathered, freed and reduced together, and one rank's range of them.

    Args:
        name: for messages and tables.
        params: of one dtype.
        rank, ranks: which range is owned, of how many.
        sharded: the rank keeps nothing but its range (stage 3); else whole parameters too (stages 1 and 2).

    Attributes:
        numel: elements of all parameters.
        count: elements of a rank's range.
        padding: elements at the end of the last ranges that belong to no parameter: below `ranks`.
        own: (count,) the values of this rank's range.
        whole: (ranks · count,) all values while the parameters exist here, else None.
        gradient: (ranks · count,) this rank's gradients that wait to be summed, or None.
        arrived: which parameters have a gradient in there, by index.
    """

    def __init__(self, name: str, params: Sequence[Parameter], rank: int, ranks: int, sharded: bool):
        self.name, self.params, self.sharded = name, list(params), sharded
        self.shapes = [_local_shape(p) for p in self.params]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.starts = [0, *accumulate(self.sizes)][:-1]
        self.numel = sum(self.sizes)
        self.count = -(-self.numel // ranks)
        self.padding = ranks * self.count - self.numel
        self.range = slice(rank * self.count, (rank + 1) * self.count)
        self.own: Array = np.empty(0)
        self.whole: Array | None = None
        self.gradient: Array | None = None
        self.arrived: set[int] = set()
        self.pieces: list[Piece] = []
        self._index = {id(p): i for i, p in enumerate(self.params)}

    @property
    def padded(self) -> int:
        """Elements of the flat array, padding included: what each collective of the unit is about."""
        return self.numel + self.padding

    # Values -------------------------------------------------------------------------------------------

    def adopt(self) -> Array:
        """Return the flat array of the parameters' present values; their own arrays are freed."""
        first = self.params[0].data
        flat = array_module(first).zeros(self.padded, first.dtype)
        for p, view in zip(self.params, self.views(flat)):
            view[...] = p.data
            p.data = view
        return flat

    def draw(self, seed: int, dtype: Any, device: str) -> Array:
        """Return the serial initialisation's flat values: this rank's range if sharded, else all of them.

        Bitwise the serial ones: each element is a function of (seed, name, its index) alone.
        """
        span = self.range if self.sharded else slice(0, self.padded)
        flat = np.zeros(span.stop - span.start, dtype)
        for p, start, size in zip(self.params, self.starts, self.sizes):
            low, high = max(start, span.start), min(start + size, span.stop)
            if low < high:
                _draw(p, seed, low - start, flat[low - span.start : high - span.start])
        return to_device(flat, device)

    def begin(self, values: Array) -> None:
        """Take the first values: (count,) this rank's range, or (ranks · count,) all of them."""
        whole = len(values) != self.count or not self.sharded
        own = values[self.range] if whole else values
        low, high = self.range.start, self.range.stop
        for p, start, size in zip(self.params, self.starts, self.sizes):
            a, b = max(start, low), min(start + size, high)
            if a < b:
                place = slice(a - low, b - low)
                self.pieces.append(Piece(p, Tensor(own[place], p.requires_grad), a - start, place))
        if self.sharded:
            own = own.copy() if whole else own
            for p, shape in zip(self.params, self.shapes):
                p.sharded = (shape, own.dtype)
            self._hold(own)
            self.free()
        else:
            self.attach(values)

    def _hold(self, own: Array) -> None:
        self.own = own
        for piece in self.pieces:
            piece.tensor.data = own[piece.place]

    def views(self, flat: Array) -> list[Array]:
        """Return one view of a flat array of the unit per parameter, in its shape."""
        return [flat[a : a + n].reshape(shape) for a, n, shape in zip(self.starts, self.sizes, self.shapes)]

    def attach(self, whole: Array) -> None:
        """Make the parameters views of `whole`. Their versions stay: the values are the same."""
        self.whole = whole
        for p, view in zip(self.params, self.views(whole)):
            p.data = view
        if not self.sharded:
            self._hold(whole[self.range])

    def free(self) -> None:
        """Forget the whole parameters of a sharded unit; this rank's range stays."""
        self.whole = None
        for p in self.params:
            if p.is_materialized:
                del p.data

    def is_done(self) -> None:
        """Take note that backward needs the whole parameters no longer."""
        if self.sharded:
            self.free()

    # Gradients ----------------------------------------------------------------------------------------

    def _zeros(self, n: int) -> Array:
        """Return (n,) zeros to sum over ranks: float32 for two-byte floats, with the reason in `buckets`."""
        return array_module(self.own).zeros(n, work_dtype(self.own.dtype))

    def take_gradient(self, p: Parameter) -> None:
        """Move `p.grad` to its place in the flat gradient."""
        if self.gradient is None:
            self.gradient = self._zeros(self.padded)
        i = self._index[id(p)]
        place = self.gradient[self.starts[i] : self.starts[i] + self.sizes[i]]
        place.reshape(self.shapes[i])[...] = p.grad
        self.arrived.add(i)
        p.grad = None

    def send_gradient(self) -> Array:
        """Give up the flat gradient, zero where there was none, and return it."""
        flat, self.gradient = self.gradient, None
        return self._zeros(self.padded) if flat is None else flat

    def add_gradient(self, chunk: Array, used: set[int]) -> None:
        """Add the ranks' sum over this rank's range to the pieces' gradients.

        Args:
            chunk: (count,), owned by the caller no longer.
            used: the parameters, by index, that had a gradient on any rank; the others' stays as it was.
        """
        chunk = chunk.astype(self.own.dtype, copy=False)
        for piece in self.pieces:
            if self._index[id(piece.param)] in used:
                if piece.tensor.grad is None:
                    piece.tensor.grad = chunk[piece.place]
                else:
                    piece.tensor.grad += chunk[piece.place]

    def own_gradient(self) -> tuple[Array, set[int]]:
        """Return (count,) the summed gradient of this rank's range, and which parameters have one in it."""
        flat, present = array_module(self.own).zeros(self.count, self.own.dtype), set()
        for piece in self.pieces:
            if piece.tensor.grad is not None:
                flat[piece.place] = piece.tensor.grad
                present.add(self._index[id(piece.param)])
        return flat, present


def _local_shape(p: Parameter) -> tuple[int, ...]:
    """The shape of what this rank computes with: a slice where a tensor-parallel plan cut the parameter."""
    shape: tuple[int, ...] = p.shape if p.layout is None else p.layout.local_shape(p.global_shape)
    return shape


def _draw(p: Parameter, seed: int, start: int, out: Array) -> None:
    """Fill `out` (n,) with elements `start` and on of the parameter's serial initialisation."""
    key = random.stream(seed, p.name)
    if p.layout is None or _local_shape(p) == p.global_shape:
        for a in range(0, len(out), BLOCK):
            n = min(BLOCK, len(out) - a)
            out[a : a + n] = p.initialiser.draw(key, start + a, n)
    else:  # a slice of the parameter, whose elements are not consecutive in the serial one
        out[...] = p.layout.initial(p.initialiser, key, p.global_shape).reshape(-1)[start : start + len(out)]


def make_units(
    model_params: Sequence[tuple[str, Parameter]],
    blocks: Sequence[tuple[str, Sequence[Parameter]]],
    rank: int,
    ranks: int,
    sharded: bool,
) -> tuple[list[FlatUnit | None], FlatUnit | None]:
    """Return a unit per block (None for one without parameters), and the unit of what no block has to itself.

    Args:
        model_params: all (name, parameter) of the model.
        blocks: (name, parameters) of each block in the order of forward.

    Raises:
        UsageError: a block with a parameter that the model does not have, or parameters of several dtypes.
    """
    known = {id(p): name for name, p in model_params}
    users: dict[int, int] = {}
    for name, params in blocks:
        for p in params:
            if id(p) not in known:
                raise UsageError(f"Zero: {name} has a parameter {p.shape} that is not the model's")
            users[id(p)] = users.get(id(p), 0) + 1
    groups = [(name, [p for p in params if users[id(p)] == 1]) for name, params in blocks]
    groups.append(("shared", [p for _, p in model_params if users.get(id(p)) != 1]))
    units: list[FlatUnit | None] = []
    for name, params in groups:
        dtypes = {str(p.dtype) for p in params if p.is_materialized}
        if len(dtypes) > 1:
            mixed = " and ".join(sorted(dtypes))
            raise UsageError(f"Zero: {name} mixes {mixed}; give each dtype a unit of its own")
        units.append(FlatUnit(name, params, rank, ranks, sharded) if params else None)
    return units[:-1], units[-1]
