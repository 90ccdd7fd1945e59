"""What every communicator must do, written once and run on both engines.

Each scenario is a function of a communicator that asserts; a MismatchError that it provokes is caught on
every rank, so the communicator works on afterwards. `test_comm_threads.py` runs them on threads,
`mpi_scenarios.py` (started by `test_comm_mpi.py`) in one MPI job.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from minipar.comm import Communicator, balanced
from minipar.comm.collectives import ALGORITHMS
from minipar.comm.threads import ThreadCommunicator
from minipar.errors import MismatchError, UsageError

SCENARIOS: dict[str, Callable[[Communicator], None]] = {}
LENGTHS = (0, 1, 2, 3, 7, 100, 20_001)  # none, fewer than ranks, small, and several blocks


def scenario(fn: Callable[[Communicator], None]) -> Callable[[Communicator], None]:
    SCENARIOS[fn.__name__] = fn
    return fn


def part(rank: int, n: int, dtype: object = np.float64) -> np.ndarray:
    """Rank `rank`'s array of n elements: known to every rank, different on each."""
    x = np.random.default_rng((rank, n)).integers(-50, 50, n)
    return (x % 2 == 0) if np.dtype(dtype) == bool else x.astype(dtype)


def parts(comm: Communicator, n: int, dtype: object = np.float64) -> list[np.ndarray]:
    return [part(rank, n, dtype) for rank in range(comm.size)]


def same_everywhere(comm: Communicator, x: np.ndarray) -> None:
    copies = comm.all_gather_object((x.tobytes(), x.shape, str(x.dtype)))
    assert len(set(copies)) == 1


def refused(comm: Communicator, call: Callable[[], object], *fragments: str) -> None:
    """Assert that `call` is a MismatchError on every rank, with one text that has these fragments."""
    with pytest.raises(MismatchError) as caught:
        call()
    texts = comm.all_gather_object(str(caught.value))
    assert len(set(texts)) == 1
    for fragment in fragments:
        assert fragment in texts[0], (fragment, texts[0])


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
        with pytest.raises(UsageError, match="MPI can copy bfloat16 but not reduce it"):
            comm.all_reduce(x)


# Point to point ---------------------------------------------------------------------------------------


@scenario
def messages_around_a_ring(comm: Communicator) -> None:
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for shape in ((), (0,), (3,), (2, 3), (50_000,)):
        x = np.full(shape, comm.rank, np.float32)
        sending = comm.isend(x, after, tag=7)
        received = comm.recv(before, tag=7)
        sending.wait()
        assert received.shape == shape and received.dtype == np.float32 and (received == before).all()
        sending = comm.isend(x, after)
        received = comm.recv(before, shape=shape, dtype=np.float32)
        sending.wait()
        assert (received == before).all()
        sending = comm.isend(x, after)
        out = np.empty(shape, np.float32)
        assert comm.recv_(out, before) is out
        sending.wait()
        assert (out == before).all()


@scenario
def messages_keep_their_order_and_tags(comm: Communicator) -> None:
    if comm.size == 1:
        return
    if comm.rank == 0:
        sends = [comm.isend(np.full(n + 1, n), 1, tag=n % 2) for n in range(6)]
        for sending in sends:
            sending.wait()
    elif comm.rank == 1:
        odd = [comm.irecv(0, tag=1) for _ in range(3)]
        even = [comm.irecv(0, tag=0, shape=(2 * n + 1,), dtype=np.int64) for n in range(3)]
        mixed = [work.wait() for work in (odd[2], odd[0], odd[1], even[1], even[0], even[2])]
        assert [int(x[0]) for x in mixed] == [5, 1, 3, 2, 0, 4]
        assert [len(x) for x in mixed] == [6, 2, 4, 3, 1, 5]


@scenario
def received_arrays_are_fresh(comm: Communicator) -> None:
    if comm.rank == 0 and comm.size > 1:
        for n in range(3):
            x = np.full(4, n)
            comm.send(x, 1)
            x[:] = -1
    elif comm.rank == 1:
        arrays = [comm.recv(0, shape=(4,), dtype=np.int64) for _ in range(3)]
        assert [int(x[0]) for x in arrays] == [0, 1, 2]


@scenario
def done_becomes_true_without_wait(comm: Communicator) -> None:
    works = [comm.all_reduce_async(np.ones(10)), comm.all_gather_async(np.ones(1))]
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    works += [comm.irecv(before), comm.isend(np.ones(3), after)]
    while not all([work.done() for work in works]):
        continue
    assert (works[0].wait() == comm.size).all()
    assert works[0].wait() is works[0].wait()
    assert len(works[2].wait()) == 3


@scenario
def ranks_and_tags_out_of_range_are_refused(comm: Communicator) -> None:
    x = np.ones(1)
    for call in (
        lambda: comm.send(x, comm.size),
        lambda: comm.recv(-1),
        lambda: comm.broadcast(x, comm.size),
        lambda: comm.send(x, 0, tag=-1),
        lambda: comm.recv(0, shape=(1,)),
        lambda: comm.all_reduce(x, "mean"),
        lambda: comm.all_reduce([1.0]),
        lambda: comm.all_reduce(np.array([object()])),
        lambda: comm.split(-1),
        lambda: comm.reduce_scatter(np.ones(3), [3] + [-1] * comm.size),
    ):
        with pytest.raises(UsageError):
            call()
    assert comm.all_reduce(x) == comm.size, "nothing was begun"


# In the background ------------------------------------------------------------------------------------


@scenario
def async_forms_give_what_the_blocking_ones_give(comm: Communicator) -> None:
    for n in LENGTHS:
        x, y = part(comm.rank, n), part(comm.rank, n)
        works = [
            comm.all_reduce_async(x),
            comm.all_reduce_async_(y),
            comm.reduce_scatter_async(x),
            comm.all_gather_async(x),
            comm.broadcast_async(x, comm.size - 1),
        ]
        total, in_place, chunk, joined, copy = [work.wait() for work in reversed(works)][::-1]
        assert in_place is y and np.array_equal(y, comm.all_reduce(x))
        assert np.array_equal(total, comm.all_reduce(x))
        assert np.array_equal(chunk, comm.reduce_scatter(x))
        assert np.array_equal(joined, comm.all_gather(x))
        assert np.array_equal(copy, comm.broadcast(x, comm.size - 1))


@scenario
def blocking_calls_pass_pending_ones_in_order(comm: Communicator) -> None:
    pending = [comm.all_reduce_async(np.full(5000, float(n))) for n in range(20)]
    assert comm.all_reduce(np.ones(3))[0] == comm.size
    comm.barrier()
    assert [work.wait()[0] for work in pending] == [n * comm.size for n in range(20)]


@scenario
def a_message_may_come_before_a_pending_collective(comm: Communicator) -> None:
    """Rank 0 issues first and then receives, the others send first and then issue: legal, and no deadlock."""
    if comm.rank == 0:
        work = comm.all_reduce_async(np.ones(4))
        for source in range(1, comm.size):
            assert comm.recv(source)[0] == source
    else:
        comm.send(np.full(1, comm.rank), 0)
        work = comm.all_reduce_async(np.ones(4))
    assert (work.wait() == comm.size).all()


# Groups -----------------------------------------------------------------------------------------------


@scenario
def split_makes_independent_groups(comm: Communicator) -> None:
    half = comm.split(comm.rank % 2, name="dp")
    assert half is not None and half.name == f"{comm.name}/dp{comm.rank % 2}"
    assert half.members == tuple(range(comm.rank % 2, comm.size, 2))
    assert half.members[half.rank] == comm.rank
    assert half.all_reduce(np.array([comm.rank]))[0] == sum(half.members)
    if comm.rank % 2 == 0:  # one group does what the other does not
        half.barrier()
        half.all_gather(np.ones(2))
    inner = half.split(0)
    assert inner is not None and inner.size == half.size and inner.name == f"{half.name}/1.0"


@scenario
def split_orders_by_key_and_leaves_out_none(comm: Communicator) -> None:
    turned = comm.split(0, key=-comm.rank)
    assert turned is not None and turned.rank == comm.size - 1 - comm.rank
    assert turned.broadcast(np.array([comm.rank]), 0)[0] == comm.size - 1
    rest = comm.split(None if comm.rank == 0 else 3)
    assert (rest is None) == (comm.rank == 0)
    assert rest is None or rest.size == comm.size - 1


@scenario
def ledger_counts_exactly(comm: Communicator) -> None:
    n, size = 12, comm.size
    group = comm.split(0, name="counted")
    assert group is not None and group.ledger is comm.ledger
    comm.ledger.reset()
    x = np.ones(n, np.float32)
    group.all_reduce(x)
    group.all_reduce_(x)
    group.all_reduce_async(x).wait()
    group.reduce(x)
    group.broadcast(x)
    group.broadcast_(x, size - 1)
    group.reduce_scatter(x)
    group.all_gather(x[: n // size], None)
    group.gather(x)
    group.scatter([x] * size if group.rank == 0 else None)
    group.all_to_all([x] * size)
    group.barrier()
    sending = group.isend(x, (group.rank + 1) % size)
    group.recv((group.rank - 1) % size)
    sending.wait()
    joined = n // size * size
    assert {op: row for (op, where), row in comm.ledger.as_dict().items() if where == group.name} == {
        "all_reduce": (3, 3 * n, 12 * n),
        "reduce": (1, n, 4 * n),
        "broadcast": (2, 2 * n, 8 * n),
        "reduce_scatter": (1, n, 4 * n),
        "all_gather": (1, joined, 4 * joined),
        "gather": (1, n, 4 * n),
        "scatter": (1, n, 4 * n),
        "all_to_all": (1, n * size, 4 * n * size),
        "barrier": (1, 0, 0),
        "send": (1, n, 4 * n),
        "recv": (1, n, 4 * n),
    }
    assert comm.ledger.ring_elements("all_reduce") * size == 3 * 2 * (size - 1) * n
    assert comm.ledger.ring_elements("reduce_scatter") * size == (size - 1) * n
    assert comm.ledger.ring_elements("all_gather") * size == (size - 1) * joined


@scenario
def textbook_all_reduces_are_the_same_sum(comm: Communicator) -> None:
    for name, algorithm in ALGORITHMS.items():
        for n in LENGTHS:
            x = part(comm.rank, n)
            result = algorithm(comm, x)
            assert np.array_equal(result, sum(parts(comm, n))), (name, n)
        assert np.array_equal(algorithm(comm, part(comm.rank, 6).reshape(2, 3), "max").shape, (2, 3))
        noise = np.random.default_rng(comm.rank).normal(size=1001).astype(np.float32)
        same_everywhere(comm, algorithm(comm, noise))


# Wrong use --------------------------------------------------------------------------------------------


@scenario
def mismatches_are_named_on_every_rank(comm: Communicator) -> None:
    if comm.size == 1:
        return
    last, x = comm.rank == comm.size - 1, np.ones(4, np.float32)
    number = comm._number + 1
    refused(
        comm,
        lambda: comm.broadcast(x) if last else comm.all_reduce(x),
        f"called all_reduce #{number} of (4,) float32",
        f"rank {comm.size - 1} called broadcast #{number}(root=0) of (4,) float32",
        "differ in operation",
    )
    refused(comm, lambda: comm.all_reduce(x.astype(np.float64) if last else x), "float64", "differ in dtype")
    refused(comm, lambda: comm.all_reduce(x, "max" if last else "sum"), "op=max", "differ in op")
    refused(comm, lambda: comm.all_reduce(np.ones(5 if last else 4)), "(5,)", "(4,)", "differ in shape")
    refused(comm, lambda: comm.broadcast(x, 1 if last else 0), "root=1", "root=0", "differ in root")
    refused(comm, lambda: comm.reduce(x, 1 if last else 0), "differ in root")
    refused(comm, lambda: comm.all_gather(np.ones(3 if last else 2)), "differ in counts and shape")
    refused(comm, lambda: comm.barrier() if last else comm.all_reduce(x), "barrier", "differ in operation")
    refused(comm, lambda: comm.split(0) if last else comm.all_gather_object(1), "split", "all_gather_object")
    counts = [4] + [0] * (comm.size - 1)
    refused(comm, lambda: comm.reduce_scatter(x, counts[::-1] if last else counts), "differ in counts")
    refused(
        comm,
        lambda: comm.all_reduce(x) if last else comm.all_reduce_async(x).wait(),
        "all_reduce_async",
        "differ in operation",
    )
    assert comm.all_reduce(x)[0] == comm.size, "the communicator works on"


@scenario
def a_mismatch_in_a_group_names_world_ranks(comm: Communicator) -> None:
    if comm.size < 2:
        return
    turned = comm.split(0, key=-comm.rank, name="turned")
    assert turned is not None
    with pytest.raises(MismatchError, match=rf"rank {comm.size - 1} called barrier #1 in world/turned0"):
        if turned.rank == 0:
            turned.barrier()
        else:
            turned.all_reduce(np.ones(1))
    comm.barrier()
