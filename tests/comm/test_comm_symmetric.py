"""Symmetric memory: right whoever is ahead, and told where a host has no room for it."""

from __future__ import annotations

import mmap
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from mpi_helpers import mpirun

from minipar.comm.guard import Call
from minipar.comm.mpi_work import MPICollective
from minipar.comm.symmetric import SymmetricArray, room


class Barriers:
    """The barriers of ranks that are played by one process: the n-th is complete when all have begun n of them."""

    def __init__(self, ranks: int) -> None:
        self.begun = [0] * ranks

    def of(self, rank: int) -> Any:
        def begin() -> int:
            self.begun[rank] += 1
            return self.begun[rank]

        return begin

    def complete(self, number: int) -> bool:
        return min(self.begun) >= number


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_read_too_early_or_written_too_late(ranks: int, seed: int) -> None:
    """Each rank goes on when it may, at random; when it is done it writes over its array at once."""
    draw, n, dtype = random.Random(seed), 1000, np.dtype("f8")
    memory = mmap.mmap(-1, ranks * room(n, dtype))
    arrays = [SymmetricArray(memory, n, dtype, rank, ranks, 1) for rank in range(ranks)]
    given = np.random.default_rng(seed).normal(size=(10, ranks, n))
    barriers, turns, stages = Barriers(ranks), [0] * ranks, [[] for _ in range(ranks)]
    waits_for = [0] * ranks  # the number of the barrier that a rank has begun last
    for rank in range(ranks):
        arrays[rank].mine()[...] = given[0, rank]
        stages[rank] = arrays[rank].all_reduce("sum", barriers.of(rank))
    while min(turns) < len(given):
        rank = draw.randrange(ranks)
        if turns[rank] == len(given) or not barriers.complete(waits_for[rank]):
            continue
        if stages[rank]:
            waits_for[rank] = stages[rank].pop(0)()
            continue
        np.testing.assert_allclose(arrays[rank].mine(), given[turns[rank]].sum(0), rtol=1e-12)
        turns[rank] += 1
        if turns[rank] < len(given):
            arrays[rank].mine()[...] = given[turns[rank], rank]
            stages[rank] = arrays[rank].all_reduce("sum", barriers.of(rank))


def test_every_rank_reduces_in_the_order_of_ranks() -> None:
    """So that the sum is bitwise that of the other engine: here 1e8 + 1 - 1e8 + 1 in float32, which is 1."""
    ranks, n, dtype = 4, 12, np.dtype("f4")
    memory = mmap.mmap(-1, ranks * room(n, dtype))
    arrays = [SymmetricArray(memory, n, dtype, rank, ranks, 1) for rank in range(ranks)]
    for array, value in zip(arrays, (1e8, 1, -1e8, 1)):
        array.mine()[...] = value
    stages = [array.all_reduce("sum", lambda: None) for array in arrays]
    for stage in zip(*stages):
        for start in stage:
            start()
    assert all((array.mine() == 1).all() for array in arrays)


def test_what_overflows_is_not_told_by_a_warning() -> None:
    """As little as MPI tells: loss scaling looks for it in the sums."""
    dtype = np.dtype("f4")
    memory = mmap.mmap(-1, 2 * room(3, dtype))
    arrays = [SymmetricArray(memory, 3, dtype, rank, 2, 1) for rank in range(2)]
    for array, values in zip(arrays, ([3e38, np.inf, 1], [3e38, -np.inf, 1])):
        array.mine()[...] = values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stage in zip(*(array.all_reduce("sum", lambda: None) for array in arrays)):
            for start in stage:
                start()
    for array in arrays:
        np.testing.assert_array_equal(array.mine(), [np.inf, np.nan, 2])


def test_a_stage_waits_for_the_one_before_it() -> None:
    class Request:
        complete = False

        def Test(self) -> bool:
            return self.complete

    requests, begun = [Request(), Request()], []

    def stage(request: Request) -> Any:
        begun.append(request)
        return request

    stages = [lambda request=request: stage(request) for request in requests]
    work = MPICollective(SimpleNamespace(checks=False), Call(), stages, lambda: np.zeros(0))  # type: ignore[arg-type]
    assert work.started() is None and work.started() is None and begun == requests[:1]
    requests[0].complete = True
    assert work.started() is True and begun == requests


FULL = """
from minipar.comm import symmetric
symmetric.map_together = lambda comm, nbytes: (None, f"no memory to share on here: {nbytes} B are too much")
"""
LIMITED = """
from minipar.comm import shared_memory
class Limited:
    def mmap(file, nbytes):
        raise OSError(f"{nbytes} B are too much")
if comm.rank == 1:
    shared_memory.mmap = Limited
"""
SUM = """
x = comm.symmetric(100_000, "float32")
x += 1
assert comm.all_reduce_(x).sum() == 200_000
"""


@pytest.mark.parametrize("why", [FULL, LIMITED], ids=["no room", "one rank's limit"])
def test_a_host_without_room_is_told_once_and_sums_all_the_same(why: str, tmp_path: Path) -> None:
    script, before = tmp_path / "full.py", set(Path("/dev/shm").glob("minipar-memory-*"))
    script.write_text(f"import minipar\ncomm = minipar.world()\n{why}{SUM}")
    job = mpirun(2, script)
    assert job.code == 0, job
    assert job.err.count("802816 B are too much: sums of 100000 float32 go through MPI now") == 1
    assert set(Path("/dev/shm").glob("minipar-memory-*")) <= before
