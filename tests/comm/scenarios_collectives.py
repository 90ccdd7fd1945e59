"""Scenarios of the collectives: what they give, for every length, dtype, root and op."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from scenario_helpers import LENGTHS, part, parts, same_everywhere, scenario

from minipar.comm import Communicator, balanced
from minipar.comm.threads import ThreadCommunicator
from minipar.errors import UsageError

# Reductions -------------------------------------------------------------------------------------------


@scenario
def all_reduce_of_every_length(comm: Communicator) -> None:
    for n in LENGTHS:
        x = part(comm.rank, n)
        result = comm.all_reduce(x)
        assert np.array_equal(result, sum(parts(comm, n)))
        assert np.array_equal(x, part(comm.rank, n)), "the input is not written to"


@scenario
def all_reduce_with_every_op_and_dtype(comm: Communicator) -> None:
    ops = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}
    for dtype in (np.float16, np.float32, np.float64, np.int8, np.int32, np.int64, np.uint8, bool):
        for name, ufunc in ops.items():
            inputs = [x % 3 if dtype is not bool else x for x in parts(comm, 9, dtype)]
            result = comm.all_reduce(inputs[comm.rank], name)
            assert result.dtype == np.dtype(dtype)
            expected = inputs[0]
            for other in inputs[1:]:
                expected = ufunc(expected, other)
            assert np.array_equal(result, expected), (dtype, name)


@scenario
def all_reduce_is_bitwise_the_same_on_all_ranks(comm: Communicator) -> None:
    for n in (5, 1000, 100_000):
        for dtype in (np.float16, np.float32, np.float64):
            x = np.random.default_rng(comm.rank).normal(size=n).astype(dtype)
            first, second = comm.all_reduce(x), comm.all_reduce(x)
            same_everywhere(comm, first)
            assert first.tobytes() == second.tobytes(), "repeatable"


@scenario
def max_and_min_keep_nan_whoever_holds_it(comm: Communicator) -> None:
    for holder in range(comm.size):
        x = np.full(3, np.nan if comm.rank == holder else comm.rank, np.float32)
        assert np.isnan(comm.all_reduce(x, "max")).all()
        assert np.isnan(comm.all_reduce(x, "min")).all()


@scenario
def all_reduce_keeps_shapes(comm: Communicator) -> None:
    for shape in ((), (1,), (2, 3), (2, 0, 4), (3, 1, 2)):
        assert comm.all_reduce(np.ones(shape)).shape == shape
    column = np.arange(6.0).reshape(2, 3).T  # not contiguous
    assert np.array_equal(comm.all_reduce(column), column * comm.size)


@scenario
def all_reduce_in_place(comm: Communicator) -> None:
    for n in LENGTHS:
        x = part(comm.rank, n)
        assert comm.all_reduce_(x) is x
        assert np.array_equal(x, sum(parts(comm, n)))
    with pytest.raises(UsageError, match="C-contiguous"):
        comm.all_reduce_(np.ones((2, 3)).T)


@scenario
def reduce_to_each_root(comm: Communicator) -> None:
    for root in range(comm.size):
        for n in LENGTHS:
            result = comm.reduce(part(comm.rank, n), root)
            if comm.rank == root:
                assert result is not None and np.array_equal(result, sum(parts(comm, n)))
            else:
                assert result is None
        result = comm.reduce(part(comm.rank, 5), root, "max")
        assert result is None or np.array_equal(result, np.max(parts(comm, 5), 0))


@scenario
def reduce_scatter_of_every_length(comm: Communicator) -> None:
    for n in LENGTHS:
        result = comm.reduce_scatter(part(comm.rank, n))
        start = sum(balanced(n, comm.size)[: comm.rank])
        expected = sum(parts(comm, n))[start : start + len(result)]
        assert len(result) == balanced(n, comm.size)[comm.rank]
        assert np.array_equal(result, expected)


@scenario
def reduce_scatter_of_rows_with_counts(comm: Communicator) -> None:
    counts = [rank % 3 for rank in range(comm.size)]  # some get nothing
    n = sum(counts)
    inputs = [x.reshape(n, 4) for x in parts(comm, n * 4)]
    result = comm.reduce_scatter(inputs[comm.rank], counts)
    start = sum(counts[: comm.rank])
    assert np.array_equal(result, sum(inputs)[start : start + counts[comm.rank]])
    with pytest.raises(UsageError, match="rows in all"):
        comm.reduce_scatter(np.ones(n + 1), counts)


# Copies -----------------------------------------------------------------------------------------------


@scenario
def broadcast_from_each_root(comm: Communicator) -> None:
    for root in range(comm.size):
        for n in LENGTHS:
            x = part(comm.rank, n, np.float32)
            assert np.array_equal(comm.broadcast(x, root), part(root, n, np.float32))
            assert np.array_equal(x, part(comm.rank, n, np.float32)), "the input is not written to"
            assert comm.broadcast_(x, root) is x
            assert np.array_equal(x, part(root, n, np.float32))


@scenario
def all_gather_of_equal_and_unequal_parts(comm: Communicator) -> None:
    for n in LENGTHS:
        assert np.array_equal(comm.all_gather(part(comm.rank, n)), np.concatenate(parts(comm, n)))
        mine = balanced(n, comm.size)
        pieces = [part(rank, mine[rank]) for rank in range(comm.size)]
        assert np.array_equal(comm.all_gather(pieces[comm.rank], mine), np.concatenate(pieces))
    rows = comm.all_gather(np.full((2, 3), comm.rank))
    assert rows.shape == (2 * comm.size, 3) and rows[-1, 0] == comm.size - 1
    with pytest.raises(UsageError, match="axis 0"):
        comm.all_gather(np.array(1.0))


@scenario
def all_gather_undoes_reduce_scatter(comm: Communicator) -> None:
    for n in LENGTHS:
        chunk = comm.reduce_scatter(part(comm.rank, n))
        assert np.array_equal(comm.all_gather(chunk, balanced(n, comm.size)), sum(parts(comm, n)))


@scenario
def gather_and_scatter_of_any_shapes(comm: Communicator) -> None:
    shapes = [(rank, 2) for rank in range(comm.size)]
    for root in range(comm.size):
        gathered = comm.gather(np.full(shapes[comm.rank], comm.rank), root)
        if comm.rank != root:
            assert gathered is None
        else:
            assert gathered is not None
            assert [x.shape for x in gathered] == shapes
            assert all((x == rank).all() for rank, x in enumerate(gathered))
        pieces = [np.full(shape, 10.0 * rank) for rank, shape in enumerate(shapes)]
        mine = comm.scatter(pieces if comm.rank == root else None, root)
        assert mine.shape == shapes[comm.rank] and (mine == 10.0 * comm.rank).all()
    if comm.size > 1 and comm.rank == 1:
        with pytest.raises(UsageError, match="only root 0"):
            comm.scatter([np.ones(1)] * comm.size, 0)


@scenario
def all_to_all_of_any_shapes(comm: Communicator) -> None:
    received = comm.all_to_all([np.full((comm.rank, to), 10 * comm.rank + to) for to in range(comm.size)])
    for source, x in enumerate(received):
        assert x.shape == (source, comm.rank) and (x == 10 * source + comm.rank).all()
    with pytest.raises(UsageError, match="one part for each"):
        comm.all_to_all([np.ones(1)] * (comm.size + 1))


@scenario
def objects_are_copies(comm: Communicator) -> None:
    settings = {"rank": comm.rank, "list": [1, 2]}
    for root in range(comm.size):
        copy = comm.broadcast_object(settings, root)
        assert copy["rank"] == root and copy is not settings
        copy["list"].append(3)
    everyone = comm.all_gather_object(settings)
    assert [other["rank"] for other in everyone] == list(range(comm.size))
    assert everyone[comm.rank] is not settings and everyone[0]["list"] == [1, 2]


@scenario
def results_belong_to_the_receiver(comm: Communicator) -> None:
    """Writing into a result, or an input, after a call changes nothing on any other rank or in any result."""
    x = np.full(40_000, float(comm.rank))
    results = [comm.all_reduce(x), comm.broadcast(x), comm.all_gather(x), comm.reduce_scatter(x)]
    results += comm.all_to_all([x] * comm.size)
    results.append(comm.scatter([x] * comm.size if comm.rank == 0 else None))
    results += comm.gather(x) or []
    before = [result.copy() for result in results]
    x[:] = -1.0
    comm.barrier()
    for mine, kept in zip(results, before):
        assert np.array_equal(mine, kept)
    for mine in results:
        mine[:] = 100.0 + comm.rank
    comm.barrier()
    for mine in results:
        assert (mine == 100.0 + comm.rank).all()
        assert mine.flags.owndata or mine.base.flags.owndata


@scenario
def bfloat16_is_copied_and_reduced_on_threads(comm: Communicator) -> None:
    x = np.arange(5).astype(ml_dtypes.bfloat16) + ml_dtypes.bfloat16(comm.rank)
    assert comm.broadcast(x, comm.size - 1).dtype == x.dtype
    gathered = comm.all_gather(x)
    assert gathered.dtype == x.dtype and float(gathered[-1]) == 4 + comm.size - 1
    pieces = comm.all_to_all([x] * comm.size)
    assert pieces[-1].dtype == x.dtype and float(pieces[-1][0]) == comm.size - 1
    if isinstance(comm, ThreadCommunicator):
        assert float(comm.all_reduce(x)[1]) == sum(range(1, comm.size + 1))
    else:  # refused by name
        for reduced in (comm.all_reduce, comm.reduce, comm.reduce_scatter, comm.all_reduce_async):
            with pytest.raises(UsageError, match="MPI can copy bfloat16 but not reduce it"):
                reduced(x)
            assert comm.journal.waiting is None, "else what the program does instead counts as a hang"
