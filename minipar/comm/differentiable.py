"""Collectives as differentiable operations: each forward paired with its adjoint.

A rank's tensor is one block of a big vector; a collective is a linear map of that vector, and backward is its
transpose. So a model whose tensors are spread over ranks needs no gradient code of its own.

    forward                        backward
    copy_to       identity         all-reduce        one tensor feeds every rank: their gradients add up
    reduce_from   all-reduce       identity          every rank's term enters one sum
    scatter       take own part    all-gather        of a tensor that all ranks hold
    gather        all-gather       take own part     into a tensor that all ranks then use alike
    all_gather    all-gather       reduce-scatter    into a tensor that each rank then uses differently
    reduce_scatter reduce-scatter  all-gather
    all_to_all    all-to-all       all-to-all        back again
    send / recv   send / receive   receive / send    a gradient travels the way back

Sums of two-byte floats are taken in float32 and rounded once, as within one matrix product: added up in float16
they could overflow on the way, and MPI knows no sum of bfloat16.

copy_to and reduce_from are f and g of Megatron-LM (Shoeybi et al. 2019, section 3); all_gather and
reduce_scatter are g and ḡ of its sequence parallelism (Korthikanti et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minipar.backend import Array, array_module, contiguous, is_floating
from minipar.comm.interface import Communicator, balanced
from minipar.kernels.common import widen
from minipar.tensor import Tensor, primitive, record


def joined(comm: Communicator, x: Array, axis: int, counts: Sequence[int]) -> Array:
    """Return the ranks' arrays joined along `axis`, of which rank r brings `counts[r]`."""
    xp = array_module(x)
    together = comm.all_gather(contiguous(xp.moveaxis(x, axis, 0)), counts)
    return xp.moveaxis(together, 0, axis)


def summed(comm: Communicator, x: Array) -> Array:
    """Return the sum of the ranks' arrays."""
    return comm.all_reduce(contiguous(widen(x))).astype(x.dtype, copy=False)


def summed_part(comm: Communicator, x: Array, axis: int, counts: Sequence[int]) -> Array:
    """Return this rank's part along `axis` of the sum of the ranks' arrays."""
    xp = array_module(x)
    part = comm.reduce_scatter(contiguous(xp.moveaxis(widen(x), axis, 0)), counts)
    return xp.moveaxis(part, 0, axis).astype(x.dtype, copy=False)


def own_part(comm: Communicator, x: Array, axis: int, counts: Sequence[int]) -> Array:
    """Return this rank's slice of `x` along `axis`, a view."""
    start = sum(counts[: comm.rank])
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, start + counts[comm.rank])
    return x[tuple(index)]


class Lent(Tensor):
    """A parameter behind `copy_to`: it has the parameter's values as they are whenever they are read.

    So an operation that captures it by handle holds no array, as with the parameter itself, and ZeRO stage 3
    can free the parameter between forward and backward.
    """

    __slots__ = ("parameter",)

    def __init__(self, parameter: Tensor, copy: Tensor):
        self.parameter = parameter
        self.requires_grad = copy.requires_grad
        self.grad = self.grad_buffer = self._leaf = None
        self.hooks = ()
        self._maker = copy._maker

    @property
    def data(self) -> Array:  # type: ignore[override]
        return self.parameter.data

    @property
    def version(self) -> int:  # type: ignore[override]
        return self.parameter.version

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parameter.dtype


def copy_to(x: Tensor, comm: Communicator) -> Tensor:
    """x itself; the gradients of all ranks are summed."""
    copy: Tensor = _copy_to(x, comm)
    return Lent(x, copy) if x.is_weight else copy


@primitive
def _copy_to(x, comm):
    return x, lambda g: (lambda: summed(comm, g), None)


@primitive
def reduce_from(x, comm):
    """The sum of all ranks' x; each gets the gradient of the sum, which is the same everywhere."""
    return summed(comm, x), lambda g: (g, None)


def scatter(x: Tensor, comm: Communicator, axis: int, counts: Sequence[int] | None = None) -> Tensor:
    """This rank's part along `axis` of a tensor that all ranks hold; the parts' gradients are gathered."""
    return _scatter(x, comm, axis % x.ndim, tuple(counts or balanced(x.shape[axis], comm.size)))


@primitive
def _scatter(x, comm, axis, counts):
    part = contiguous(own_part(comm, x, axis, counts))
    return part, lambda g: (lambda: joined(comm, g, axis, counts), None, None, None)


def gather(x: Tensor, comm: Communicator, axis: int, counts: Sequence[int]) -> Tensor:
    """All parts joined along `axis`, for use alike on every rank; backward keeps this rank's part."""
    return _gather(x, comm, axis % x.ndim, tuple(counts))


@primitive
def _gather(x, comm, axis, counts):
    whole = joined(comm, x, axis, counts)
    return whole, lambda g: (own_part(comm, g, axis, counts), None, None, None)


def all_gather(x: Tensor, comm: Communicator, axis: int, counts: Sequence[int]) -> Tensor:
    """All parts joined along `axis`, for use differently on each rank; the gradients' sum is cut again."""
    return _all_gather(x, comm, axis % x.ndim, tuple(counts))


@primitive
def _all_gather(x, comm, axis, counts):
    whole = joined(comm, x, axis, counts)
    return whole, lambda g: (lambda: summed_part(comm, g, axis, counts), None, None, None)


def reduce_scatter(x: Tensor, comm: Communicator, axis: int, counts: Sequence[int] | None = None) -> Tensor:
    """This rank's part along `axis` of the sum of all ranks' x; backward gathers the parts' gradients."""
    return _reduce_scatter(x, comm, axis % x.ndim, tuple(counts or balanced(x.shape[axis], comm.size)))


@primitive
def _reduce_scatter(x, comm, axis, counts):
    part = summed_part(comm, x, axis, counts)
    return part, lambda g: (lambda: joined(comm, g, axis, counts), None, None, None)


@primitive
def exchange(x, comm, axis, give, take):
    """Give each rank q the interval `give[q]` of x along `axis`; return what arrives, placed side by side.

    Args:
        give: one (start, stop) of x for each rank; intervals may overlap or be empty.
        take: length that each rank gives to this one.
    """
    xp = array_module(x)
    rows = xp.moveaxis(x, axis, 0)
    parts = comm.all_to_all([contiguous(rows[start:stop]) for start, stop in give])
    value = xp.moveaxis(xp.concatenate(parts, axis=0), 0, axis)

    def back(g: Array) -> Array:
        stops = np.cumsum(take)[:-1].tolist()
        returned = comm.all_to_all([contiguous(p) for p in xp.split(xp.moveaxis(g, axis, 0), stops)])
        dx = xp.zeros(rows.shape, dtype=x.dtype)
        for (start, stop), part in zip(give, returned):
            dx[start:stop] += part  # an element given to several ranks collects all their gradients
        return xp.moveaxis(dx, 0, axis)

    return value, lambda g: (lambda: back(g), None, None, None, None)


def all_to_all(x: Tensor, comm: Communicator, split_axis: int, join_axis: int) -> Tensor:
    """Cut x along `split_axis`, send part q to rank q, join what arrives along `join_axis`.

    The parts are those of `balanced`. What cuts a sequence by time into one cut by heads, and back:
    (B, T/ranks, H, D) → (B, T, H/ranks, D) with split_axis=2, join_axis=1.
    """
    return _all_to_all(x, comm, split_axis % x.ndim, join_axis % x.ndim)


def _swap_parts(
    comm: Communicator, x: Array, cut: int, counts: Sequence[int], join: int
) -> tuple[Array, list[int]]:
    """Return the ranks' parts joined along `join`, and the length of each there."""
    xp = array_module(x)
    stops = np.cumsum(counts)[:-1].tolist()
    parts = comm.all_to_all([contiguous(part) for part in xp.split(x, stops, axis=cut)])
    return xp.concatenate(parts, axis=join), [part.shape[join] for part in parts]


@primitive
def _all_to_all(x, comm, split_axis, join_axis):
    counts = balanced(x.shape[split_axis], comm.size)
    value, joined_counts = _swap_parts(comm, x, split_axis, counts, join_axis)
    return value, lambda g: (
        lambda: _swap_parts(comm, g, join_axis, joined_counts, split_axis)[0],
        None,
        None,
        None,
    )


def send(x: Tensor, comm: Communicator, dest: int, tag: int = 0) -> Tensor:
    """Send x; return an empty tensor, the *token*. Backward from it receives x's gradient.

    Call `token.backward(token.data)`, or hand the token to the next `recv` of this rank, so that backward
    reaches it. A floating x always gets a gradient back, wanted or not, since `recv` on the other side
    cannot know: so both ranks record, or both are inside `no_grad`.
    """
    comm.send(contiguous(x.data), dest, tag)
    shape, dtype = x.shape, x.dtype

    def vjp(g: Array) -> Array:
        return comm.recv(dest, tag, shape=shape, dtype=dtype)

    if is_floating(dtype) and not x.requires_grad:
        x = x.detach().requires_grad_()
    return record("send", array_module(x.data).zeros(0, dtype=dtype), vjp, (x,))


def recv(comm: Communicator, source: int, tag: int = 0, token: Tensor | None = None) -> Tensor:
    """Receive a tensor; backward sends its gradient to where it came from. Integers carry no gradient.

    Args:
        token: what an earlier `send` of this rank returned; ties the two together for backward.

    Raises:
        TypeError: integers were received although backward was to reach the token through them.
    """
    value = comm.recv(source, tag)
    floating = is_floating(value.dtype)
    if token is not None and not floating:
        raise TypeError(f"recv: {value.dtype} carries no gradient back to the token; receive it without one")
    nothing = array_module(value).zeros(0, dtype=value.dtype)
    start = Tensor(nothing, requires_grad=floating) if token is None else token

    def vjp(g: Array) -> Array:
        comm.send(contiguous(g), source, tag)
        return array_module(g).zeros(0, dtype=g.dtype)

    return record("recv", value, vjp, (start,))
