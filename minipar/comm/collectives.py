"""How an all-reduce is made of sends and receives: four textbook algorithms, and what each costs.

Read it beside a picture of who talks to whom. Every function takes a communicator and this rank's array and
returns the sum over all ranks, like `comm.all_reduce`, for any number of ranks and any length. None relies
on messages being buffered: where two ranks send to each other, both begin the send and then receive.

Costs are in the alpha-beta model, n bytes on N ranks, a message of m bytes taking alpha + beta m and the
additions nothing. Sources: R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of collective
communication operations in MPICH", 2005 (binomial tree, recursive doubling, Rabenseifner's algorithm);
P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009 (ring).
A launch with a `Clock` measures exactly these costs where N divides n; the tree's where N is a power of two, and
less for any other N (see there).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minipar.backend import Array, array_module
from minipar.comm.interface import Communicator
from minipar.comm.member import UFUNCS
from minipar.errors import UsageError


def ring_all_reduce(comm: Communicator, x: Array, op: str = "sum") -> Array:
    """All-reduce around a ring: every rank sends to the next and receives from the one before.

    The array is cut into N chunks. In the first N-1 steps the chunks travel once around and collect every
    rank's part; then rank r holds the finished chunk r+1. In the second N-1 steps the finished chunks travel
    around. All wires are busy all the time, and each rank sends the least that is possible:

        2 (N-1) alpha + 2 (N-1)/N n beta

    Step s of the first half, four ranks; a letter is a chunk, its number the ranks summed in it so far:

        rank 0:  a1 ->   d2 ->   c3 ->   (b4 is finished here)
        rank 1:  b1 ->   a2 ->   d3 ->   (c4)
        rank 2:  c1 ->   b2 ->   a3 ->   (d4)
        rank 3:  d1 ->   c2 ->   b3 ->   (a4)
    """
    total = x.copy(order="C")
    flat, rank, size = total.reshape(-1), comm.rank, comm.size
    chunks = [flat[i * flat.size // size : (i + 1) * flat.size // size] for i in range(size)]
    after, before = (rank + 1) % size, (rank - 1) % size
    space = array_module(x).empty(max(chunk.size for chunk in chunks), x.dtype)
    for step in range(size - 1):
        mine = chunks[(rank - step) % size]
        coming = chunks[(rank - step - 1) % size]
        sending = comm.isend(mine, after)
        received = comm.recv_(space[: coming.size], before)
        sending.wait()
        combine(op, coming, received)
    for step in range(size - 1):
        sending = comm.isend(chunks[(rank + 1 - step) % size], after)
        comm.recv_(chunks[(rank - step) % size], before)
        sending.wait()
    return total


def tree_all_reduce(comm: Communicator, x: Array, op: str = "sum") -> Array:
    """Reduce to rank 0 up a binomial tree, then broadcast down the same tree.

        2 ceil(lg N) (alpha + n beta)

    The whole array moves at every level, and half of the ranks are idle after the first: short arrays only. Where N
    is no power of two one (alpha + n beta) less is measured: on the way up, the last rank that rank 0 hears of has a
    smaller tree below it, so its part is there already.

        0 <- 1    2 <- 3    4 <- 5    6 <- 7      distance 1
        0 <------ 2         4 <------ 6           distance 2
        0 <------------------ 4                   distance 4
    """
    total, rank, size = x.copy(order="C"), comm.rank, comm.size
    distance = 1
    while distance < size:
        if rank % (2 * distance) == distance:  # this rank's part is complete: hand it on and leave
            comm.send(total, rank - distance)
            break
        if rank + distance < size:
            combine(op, total, comm.recv(rank + distance, shape=x.shape, dtype=x.dtype))
        distance *= 2
    if rank != 0:  # it handed on at `distance`, and gets the result from the same rank
        comm.recv_(total, rank - distance)
    distance //= 2
    while distance >= 1:
        if rank + distance < size:
            comm.send(total, rank + distance)
        distance //= 2
    return total


def doubling_all_reduce(comm: Communicator, x: Array, op: str = "sum") -> Array:
    """All-reduce by recursive doubling: in step k, exchange everything with the rank at distance 2^k.

        lg N (alpha + n beta)

    for a power of two: the fewest steps possible, so the best for short arrays. For other N see `fold`, which
    adds 2 (alpha + n beta) to the formula for the largest power of two below N.
    """

    def among_power_of_two(total: Array, place: int, size: int, rank_of: Callable[[int], int]) -> None:
        received = array_module(x).empty_like(total)
        distance = 1
        while distance < size:
            partner = rank_of(place ^ distance)
            sending = comm.isend(total, partner)
            comm.recv_(received, partner)
            sending.wait()
            combine(op, total, received)
            distance *= 2

    return fold(comm, x, op, among_power_of_two)


def halving_doubling_all_reduce(comm: Communicator, x: Array, op: str = "sum") -> Array:
    """Rabenseifner's algorithm: reduce-scatter by recursive halving, all-gather by recursive doubling.

        2 lg N alpha + 2 (N-1)/N n beta

    for a power of two: as few bytes as the ring in as few steps as a tree, so the best for long arrays on
    many ranks. For other N see `fold`.

    In the first half partners at distance N/2, N/4, ... 1 share what both still keep: each sends one half
    of it and adds what it receives to the other. The second half goes back the same way.
    """

    def among_power_of_two(total: Array, place: int, size: int, rank_of: Callable[[int], int]) -> None:
        flat = total.reshape(-1)

        def piece(low: int, high: int) -> Array:  # of `size` equal pieces
            return flat[low * flat.size // size : high * flat.size // size]

        low, high = 0, size  # the pieces that this rank keeps
        distance = size // 2
        while distance >= 1:
            middle = (low + high) // 2
            partner = rank_of(place ^ distance)
            if place & distance:
                kept, given = (middle, high), (low, middle)
            else:
                kept, given = (low, middle), (middle, high)
            sending = comm.isend(piece(*given), partner)
            mine = piece(*kept)
            received = comm.recv(partner, shape=mine.shape, dtype=mine.dtype)
            sending.wait()
            combine(op, mine, received)
            low, high = kept
            distance //= 2
        distance = 1
        while distance < size:
            partner = rank_of(place ^ distance)
            theirs = (low - distance, low) if place & distance else (high, high + distance)
            sending = comm.isend(piece(low, high), partner)
            comm.recv_(piece(*theirs), partner)
            sending.wait()
            low, high = min(low, theirs[0]), max(high, theirs[1])
            distance *= 2

    return fold(comm, x, op, among_power_of_two)


def fold(
    comm: Communicator,
    x: Array,
    op: str,
    among_power_of_two: Callable[[Array, int, int, Callable[[int], int]], None],
) -> Array:
    """Let a power of two of the ranks do the work, when there are others (Thakur et al., section 4.5).

    With N = P + r ranks, P the largest power of two: of the first 2r ranks each even one gives its array to
    the odd one after it, and gets the result from there in the end.
    """
    total, rank, size = x.copy(order="C"), comm.rank, comm.size
    power = 1 << (size.bit_length() - 1)
    extra = size - power
    if rank < 2 * extra and rank % 2 == 0:
        comm.send(total, rank + 1)
        return comm.recv_(total, rank + 1)
    if rank < 2 * extra:
        combine(op, total, comm.recv(rank - 1, shape=x.shape, dtype=x.dtype))
    place = rank // 2 if rank < 2 * extra else rank - extra
    among_power_of_two(total, place, power, lambda p: 2 * p + 1 if p < extra else p + extra)
    if rank < 2 * extra:
        comm.send(total, rank - 1)
    return total


def combine(op: str, total: Array, received: Array) -> None:
    """Add (or take the max, min, product of) what was received into `total`."""
    getattr(array_module(total), UFUNCS[op])(total, received, out=total)


ALGORITHMS: dict[str, Callable[..., Array]] = {
    "ring": ring_all_reduce,
    "tree": tree_all_reduce,
    "doubling": doubling_all_reduce,
    "halving_doubling": halving_doubling_all_reduce,
}


def cost(algorithm: str, n_bytes: float, ranks: int, alpha: float, beta: float) -> float:
    """Return the seconds that an all-reduce of `n_bytes` over `ranks` takes in the alpha-beta model.

    Args:
        algorithm: "ring", "tree", "doubling" or "halving_doubling".
        alpha: seconds a message.
        beta: seconds a byte.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(f"algorithm {algorithm!r} is unknown; use one of {', '.join(ALGORITHMS)}")
    if ranks == 1:
        return 0.0
    if algorithm == "ring":
        return 2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * n_bytes * beta
    whole = alpha + n_bytes * beta
    if algorithm == "tree":
        return 2 * (ranks - 1).bit_length() * whole
    levels = ranks.bit_length() - 1
    power = 1 << levels
    folding = 0.0 if power == ranks else 2 * whole
    if algorithm == "doubling":
        return levels * whole + folding
    return 2 * levels * alpha + 2 * (power - 1) / power * n_bytes * beta + folding


def fastest(n_bytes: float, ranks: int, alpha: float, beta: float) -> str:
    """Return the name of the algorithm with the least `cost`, as an MPI library chooses."""
    costs = [cost(name, n_bytes, ranks, alpha, beta) for name in ALGORITHMS]
    return list(ALGORITHMS)[int(np.argmin(costs))]
