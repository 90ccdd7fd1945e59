"""Scenarios of symmetric memory: on every engine it is reduced like any other, at rest and in the background."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from scenario_helpers import LENGTHS, part, parts, refused, same_everywhere, scenario

from minipar.backend import Array
from minipar.comm import Communicator, symmetric
from minipar.comm.member import UFUNCS


def symmetric_array(comm: Communicator, n: int, dtype: object) -> Array:
    """Return a symmetric array however small it is."""
    if not comm.has_symmetric_memory:  # and on threads the ranks share the module
        return comm.symmetric(n, dtype)
    before, symmetric.SMALLEST = symmetric.SMALLEST, 0
    try:
        return comm.symmetric(n, dtype)
    finally:
        symmetric.SMALLEST = before


def shared(comm: Communicator) -> bool:
    """Whether the ranks read each other's arrays: on MPI, where they have a host in common."""
    together = comm.size > 1 and hasattr(comm, "signatures") and comm.signatures.one_host
    assert comm.has_symmetric_memory == together
    return together


@contextmanager
def unchecked(comm: Communicator) -> Iterator[None]:
    """Without checks, where they can be left out."""
    before = getattr(comm, "checks", None)
    if before is not None:
        comm.checks = False
    try:
        yield
    finally:
        if before is not None:
            comm.checks = before


@scenario
def symmetric_arrays_are_reduced_like_any_other(comm: Communicator) -> None:
    for n in LENGTHS:
        for dtype in (np.float16, np.float32, np.float64, np.int64, bool):
            x = symmetric_array(comm, n, dtype)
            assert type(x) is np.ndarray and x.shape == (n,) and x.dtype == dtype and not x.any()
            for op in UFUNCS if n < 1000 else ("sum",):
                inputs = [a % 3 if dtype is not bool else a for a in parts(comm, n, dtype)]
                x[...] = inputs[comm.rank]
                assert comm.all_reduce_(x, op) is x
                assert np.array_equal(x, comm.all_reduce(inputs[comm.rank], op)), (n, dtype, op)
                same_everywhere(comm, x)
    x = symmetric_array(comm, 3, np.float32)
    x[...] = np.nan if comm.rank == comm.size - 1 else comm.rank
    assert np.isnan(comm.all_reduce_(x, "max")).all()


@scenario
def symmetric_arrays_in_the_background(comm: Communicator) -> None:
    arrays = [symmetric_array(comm, 5000, np.float32) for _ in range(3)]

    def reduce_all() -> None:
        for turn in range(10):
            works = []
            for k, x in enumerate(arrays):
                x[...] = comm.rank + turn + k
                works += [comm.all_reduce_async_(x), comm.all_reduce_async(np.full(10, float(k)))]
            if turn % 3 == 0:
                assert comm.all_reduce(np.ones(3))[0] == comm.size
            if turn % 3 == 1:
                while not all([work.done() for work in works]):
                    continue
            results = [work.wait() for work in (works if comm.rank % 2 else reversed(works))]
            assert {id(x) for x in arrays} <= {id(result) for result in results}
            for k, x in enumerate(arrays):  # and the next turn writes over it while others still wait
                assert (x == sum(rank + turn + k for rank in range(comm.size))).all()

    reduce_all()
    with unchecked(comm):
        reduce_all()


@scenario
def a_symmetric_array_moves_on_while_a_rank_waits_for_a_message(comm: Communicator) -> None:
    """Rank 0 receives what the others send only when they have the sum, which needs rank 0's part of it."""
    for _ in range(2):
        x = symmetric_array(comm, 5000, np.float64)
        x[...] = 1
        work = comm.all_reduce_async_(x)
        if comm.rank:
            comm.send(work.wait()[:1], 0)
        for source in range(1, comm.size) if comm.rank == 0 else ():
            assert comm.recv(source)[0] == comm.size
        assert (work.wait() == comm.size).all()


@scenario
def a_rank_may_wait_in_another_group_while_a_symmetric_array_is_reduced(comm: Communicator) -> None:
    other, x = comm.split(0), symmetric_array(comm, 5000, np.float64)

    def in_either_order() -> None:
        x[...] = 1
        work = comm.all_reduce_async_(x)
        if comm.rank:
            work.wait()
        assert other.all_reduce(np.ones(2))[0] == comm.size
        assert (work.wait() == comm.size).all()

    in_either_order()
    with unchecked(comm), unchecked(other):
        in_either_order()
        assert (comm.all_reduce_(x) == comm.size**2).all()
    work = comm.all_reduce_async_(x)  # freeing a group is collective like any other operation
    if comm.rank:
        work.wait()
    other.free()
    assert (work.wait() == comm.size**3).all()


@scenario
def small_arrays_are_like_any_other(comm: Communicator) -> None:
    if shared(comm):
        known = comm._symmetric_arrays.known
        least = symmetric.SMALLEST // 8
        small, large = comm.symmetric(least - 1, np.float64), comm.symmetric(least, np.float64)
        assert id(small) not in known and id(large) in known
        assert comm.all_reduce_(small).shape == (least - 1,)


@scenario
def symmetric_is_collective(comm: Communicator) -> None:
    for n in (0, 10, 10**5) if comm.size > 1 else ():
        mine = n if comm.rank == 0 else n + 1
        refused(comm, lambda mine=mine: comm.symmetric(mine, np.float32), "they differ in shape")
        call = comm.barrier if comm.rank else lambda n=n: comm.symmetric(n, np.float32)
        refused(comm, call, "they differ in operation")


@scenario
def only_the_whole_of_a_symmetric_array_is_special(comm: Communicator) -> None:
    x = symmetric_array(comm, 2000, np.float64)
    x[...] = part(comm.rank, 2000)
    before, total = x.copy(), sum(parts(comm, 2000))
    assert np.array_equal(comm.all_reduce(x), total) and np.array_equal(x, before)
    assert np.array_equal(comm.all_reduce_(x[:1000]), total[:1000]) and np.array_equal(x[1000:], before[1000:])
    assert np.array_equal(comm.broadcast_(x, comm.size - 1), comm.broadcast(x, 0))
    if shared(comm):
        known = comm._symmetric_arrays.known
        count = len(known)
        assert known[id(x)][0]() is x
        view = x[:10]
        del x
        assert len(known) == count - 1, "what the program forgets is forgotten"
        view += 1  # its memory is there as long as a view of it


@scenario
def symmetric_arrays_are_not_mistaken_for_one_another(comm: Communicator) -> None:
    first, second = (symmetric_array(comm, 10, np.float64) for _ in range(2))
    first[...] = second[...] = 1
    mine = first if comm.rank == 0 else second
    if not shared(comm):
        assert (comm.all_reduce_(mine) == comm.size).all()
        return
    words = f"rank 0 called all_reduce #{comm._number + 1}(symmetric array", "they differ in symmetric array"
    refused(comm, lambda: comm.all_reduce_(mine), *words)
    refused(comm, lambda: comm.all_reduce_(first if comm.rank else np.ones(10)), "they differ in symmetric array")
    refused(comm, lambda: comm.all_reduce_async_(mine).wait(), "they differ in symmetric array")
    assert (first == 1).all() and (comm.all_reduce_(first) == comm.size).all()


@scenario
def a_group_has_symmetric_arrays_of_its_own(comm: Communicator) -> None:
    pair = comm.split(comm.rank // 2, name="pair")
    whole, half = (symmetric_array(group, 100, np.float32) for group in (comm, pair))
    whole[...] = half[...] = 1
    works = [comm.all_reduce_async_(whole), pair.all_reduce_async_(half)]
    for work in works if comm.rank % 2 else reversed(works):
        work.wait()
    assert (whole == comm.size).all() and (half == pair.size).all()
    assert (pair.all_reduce_(half) == pair.size**2).all()
    assert (pair.all_reduce_(whole) == comm.size * pair.size).all(), "in another group it is like any other"
