"""Differentiable collectives: each backward is the transpose of its forward, as a matrix over all ranks.

A rank's tensor is one block of a long vector, unless all ranks hold it alike: then it is one block for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from minipar import Tensor, launch, world
from minipar.comm import Communicator
from minipar.comm.differentiable import (
    all_gather,
    all_to_all,
    copy_to,
    exchange,
    gather,
    recv,
    reduce_from,
    reduce_scatter,
    scatter,
    send,
)
from minipar.comm.interface import balanced
from minipar.tape import no_grad

# Lengths of the cut axis on each rank: uneven, with empty parts.
UNEVEN = {1: [3], 2: [3, 0], 3: [0, 2, 1], 4: [1, 0, 0, 2], 5: [2, 0, 1, 0, 1]}
Shape = tuple[int, ...]


def shaped(axis: int, length: int) -> Shape:
    """A shape with 2 and 3 elsewhere."""
    shape = [2, 3]
    shape.insert(axis % 3, length)
    return tuple(shape)


def interval(ranks: int, q: int) -> tuple[int, int]:
    """What rank q is given in the exchange: overlapping, for some ranks empty."""
    return (0, 0) if q == 2 else (q % 2, 2 + q % 2)


@dataclass
class Map:
    """A collective as a linear map: `alike` says on which side all ranks hold the same tensor."""

    apply: Callable[[Tensor, Communicator, int], Tensor]
    shape: Callable[[int, int, int], Shape]  # of the input, by rank, ranks, axis
    alike: tuple[bool, bool] = (False, False)


def whole_shape(rank: int, ranks: int, axis: int) -> Shape:
    return shaped(axis, sum(UNEVEN[ranks]))


def part_shape(rank: int, ranks: int, axis: int) -> Shape:
    return shaped(axis, UNEVEN[ranks][rank])


def swap_axes(axis: int) -> tuple[int, int]:
    return axis, (axis + 1) % 3 if axis >= 0 else 0


def swap_shape(rank: int, ranks: int, axis: int) -> Shape:
    cut, join = swap_axes(axis)
    shape = [2, 2, 2]
    shape[cut], shape[join] = 3, UNEVEN[ranks][rank]
    return tuple(shape)


def exchanged(x: Tensor, comm: Communicator, axis: int) -> Tensor:
    give = [interval(comm.size, q) for q in range(comm.size)]
    mine = give[comm.rank]
    return exchange(x, comm, axis % 3, give, [mine[1] - mine[0]] * comm.size)


MAPS = {
    "copy_to": Map(lambda x, c, a: copy_to(x, c), whole_shape, (True, False)),
    "reduce_from": Map(lambda x, c, a: reduce_from(x, c), whole_shape, (False, True)),
    "scatter": Map(lambda x, c, a: scatter(x, c, a, UNEVEN[c.size]), whole_shape, (True, False)),
    "gather": Map(lambda x, c, a: gather(x, c, a, UNEVEN[c.size]), part_shape, (False, True)),
    "all_gather": Map(lambda x, c, a: all_gather(x, c, a, UNEVEN[c.size]), part_shape),
    "reduce_scatter": Map(lambda x, c, a: reduce_scatter(x, c, a, UNEVEN[c.size]), whole_shape),
    "all_to_all": Map(lambda x, c, a: all_to_all(x, c, *swap_axes(a)), swap_shape),
    "exchange": Map(exchanged, lambda r, n, a: shaped(a, 3)),
}


def reference(name: str, xs: list[np.ndarray], ranks: int, axis: int) -> list[np.ndarray]:
    """What every rank must get, by NumPy from all ranks' inputs."""
    counts = UNEVEN[ranks]
    stops = np.cumsum(counts)[:-1].tolist()
    if name == "copy_to":
        return xs
    if name == "reduce_from":
        return [sum(xs)] * ranks
    if name == "scatter":
        return np.split(xs[0], stops, axis)
    if name in ("gather", "all_gather"):
        return [np.concatenate(xs, axis)] * ranks
    if name == "reduce_scatter":
        return np.split(sum(xs), stops, axis)
    if name == "all_to_all":
        cut, join = swap_axes(axis)
        cuts = np.cumsum(balanced(3, ranks))[:-1].tolist()
        return [np.concatenate([np.split(x, cuts, cut)[r] for x in xs], join) for r in range(ranks)]
    given = [range(*interval(ranks, r)) for r in range(ranks)]
    return [np.concatenate([x.take(rows, axis) for x in xs], axis) for rows in given]


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MAPS)
def test_backward_is_the_transpose(name: str, ranks: int, axis: int) -> None:
    rng = np.random.default_rng(0)
    shapes = [MAPS[name].shape(r, ranks, axis) for r in range(ranks)]
    alike_in, alike_out = MAPS[name].alike
    sizes = [math.prod(s) for s in shapes]
    starts = [0] * ranks if alike_in else [sum(sizes[:r]) for r in range(ranks)]
    n = sizes[0] if alike_in else sum(sizes)

    def blocks(vector: np.ndarray) -> list[np.ndarray]:
        return [vector[a : a + size].reshape(s) for a, size, s in zip(starts, sizes, shapes)]

    def forward(xs: list[np.ndarray]) -> Tensor:
        comm = world()
        return MAPS[name].apply(Tensor(xs[comm.rank], requires_grad=True), comm, axis)

    def columns() -> list[np.ndarray]:
        with no_grad():
            return [forward(blocks(e)).data for e in np.eye(n)]

    of_ranks = launch(columns, ranks, timeout=20)  # [rank][input element]
    for element, e in enumerate(np.eye(n)):
        for rank, expected in enumerate(reference(name, blocks(e), ranks, axis)):
            np.testing.assert_array_equal(of_ranks[rank][element], expected)
    out_shapes = [columns[0].shape for columns in of_ranks]
    kept = of_ranks[:1] if alike_out else of_ranks
    matrix = np.concatenate([[y.ravel() for y in columns] for columns in kept], axis=1).T  # (outputs, n)

    x, g = rng.standard_normal(n), rng.standard_normal(len(matrix))
    out_sizes = [math.prod(s) for s in out_shapes]
    pieces = [
        g.reshape(s) if alike_out else g[sum(out_sizes[:r]) : sum(out_sizes[: r + 1])].reshape(s)
        for r, s in enumerate(out_shapes)
    ]

    def both() -> np.ndarray:
        comm = world()
        leaf = Tensor(blocks(x)[comm.rank].copy(), requires_grad=True)
        MAPS[name].apply(leaf, comm, axis).backward(pieces[comm.rank])
        return leaf.grad

    for gradient, expected in zip(launch(both, ranks, timeout=20), blocks(matrix.T @ g)):
        np.testing.assert_allclose(gradient, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MAPS)
def test_dtype_stays(name: str, dtype: str) -> None:
    def run() -> tuple[str, str]:
        comm = world()
        x = Tensor(np.ones(MAPS[name].shape(comm.rank, 3, 1), dtype), requires_grad=True)
        y = MAPS[name].apply(x, comm, 1)
        y.backward(np.ones_like(y.data))
        return str(y.dtype), str(x.grad.dtype)

    assert launch(run, 3) == [(dtype, dtype)] * 3


# Elements as the ledger counts them, of 3 ranks on axis 1: whole tensors are (2, 3, 3), 18 elements.
TRAFFIC = {
    "copy_to": ({}, {"all_reduce": 18}),
    "reduce_from": ({"all_reduce": 18}, {}),
    "scatter": ({}, {"all_gather": 18}),
    "gather": ({"all_gather": 18}, {}),
    "all_gather": ({"all_gather": 18}, {"reduce_scatter": 18}),
    "reduce_scatter": ({"reduce_scatter": 18}, {"all_gather": 18}),
    "exchange": ({"all_to_all": 24}, {"all_to_all": 24}),  # 2 + 2 + 0 rows of 6
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic(name: str) -> None:
    def run() -> list[dict[str, tuple[int, int, int]]]:
        comm, found = world(), []
        x = Tensor(np.ones(MAPS[name].shape(comm.rank, 3, 1)), requires_grad=True)
        y = MAPS[name].apply(x, comm, 1)
        found.append({op: counts for (op, _), counts in comm.ledger.as_dict().items()})
        comm.ledger.reset()
        y.backward(np.ones_like(y.data))
        found.append({op: counts for (op, _), counts in comm.ledger.as_dict().items()})
        return found

    for rank, found in enumerate(launch(run, 3)):
        for direction, expected in zip(found, TRAFFIC[name]):
            if name == "exchange" and direction is found[1]:
                expected = {"all_to_all": 0 if rank == 2 else 36}  # 2 rows of 6 to each of 3 ranks
            assert direction == {op: (1, n, 8 * n) for op, n in expected.items()}


def test_nothing_is_sent_back_for_what_wants_no_gradient() -> None:
    def run() -> int:
        comm = world()
        weight = Tensor(np.ones((2, 2)), requires_grad=True)
        y = copy_to(Tensor(np.ones((2, 2))), comm) * weight
        y.sum().backward()
        return comm.ledger.calls()

    assert launch(run, 2) == [0, 0]


def test_send_and_recv_carry_the_gradient_back_around() -> None:
    """x goes 0 → 1 → 2 → 0, doubled, tripled; every rank runs its own part of backward."""

    def run() -> tuple[np.ndarray | None, dict]:
        comm = world()
        rank, last = comm.rank, comm.size - 1
        x = Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
        if rank == 0:
            token = send(x * 1.0, comm, 1, tag=4)
            back = recv(comm, last, tag=4, token=token)
            np.testing.assert_array_equal(back.data, 6 * x.data)
            (back * back).sum().backward()
        else:
            token = send(recv(comm, rank - 1, tag=4) * float(rank + 1), comm, (rank + 1) % comm.size, tag=4)
            token.backward(token.data)
        return x.grad, comm.ledger.as_dict()

    results = launch(run, 3, timeout=10)
    np.testing.assert_array_equal(results[0][0], 2 * 36 * np.arange(6.0).reshape(2, 3))
    for _, traffic in results:
        assert traffic == {("send", "world"): (2, 12, 96), ("recv", "world"): (2, 12, 96)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_send_and_recv_of_every_float_and_of_scalars(shape: Shape, dtype: str) -> None:
    import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by it)

    def run() -> tuple[Shape, str, list[float]] | None:
        comm = world()
        if comm.rank == 1:
            (recv(comm, 0) * 3.0).sum().backward()
            return None
        x = Tensor(np.ones(shape, dtype), requires_grad=True)
        token = send(x, comm, 1)
        token.backward(token.data)
        assert x.grad is not None
        return x.grad.shape, x.grad.dtype.name, x.grad.astype(float).reshape(-1).tolist()

    assert launch(run, 2, timeout=10)[0] == (shape, dtype, [3.0] * math.prod(shape))


def test_scalars_stay_scalars() -> None:
    def run() -> list[Shape]:
        x, comm = Tensor(np.array(2.0), requires_grad=True), world()
        y = reduce_from(copy_to(x, comm), comm)
        y.backward()
        assert x.grad is not None and float(x.grad) == 2.0 and y.item() == 4.0
        return [y.shape, x.grad.shape]

    assert launch(run, 2, timeout=10) == [[(), ()]] * 2


def test_send_of_what_wants_no_gradient_still_takes_it_back() -> None:
    def run() -> bool:
        comm = world()
        if comm.rank == 0:
            token = send(Tensor(np.ones(3)), comm, 1)
            token.backward(token.data)
        else:
            (recv(comm, 0) * 2.0).sum().backward()
        with no_grad():  # and without recording nobody waits
            if comm.rank == 0:
                return send(Tensor(np.ones(3)), comm, 1).requires_grad
            return recv(comm, 0).requires_grad

    assert launch(run, 2, timeout=10) == [False, False]


def test_integers_carry_no_gradient() -> None:
    def run() -> None:
        comm = world()
        ids = Tensor(np.arange(3))
        if comm.rank == 0:
            assert not send(ids, comm, 1).requires_grad
            token = send(Tensor(np.ones(3), requires_grad=True), comm, 1)
            with pytest.raises(TypeError, match="int64 carries no gradient back to the token"):
                recv(comm, 1, token=token)
        else:
            received = recv(comm, 0)
            assert received.data.tolist() == [0, 1, 2] and not received.requires_grad
            recv(comm, 0)
            send(ids, comm, 0)

    launch(run, 2, timeout=10)
