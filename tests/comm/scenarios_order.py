"""Scenarios of messages, background work, groups, counting, and wrong use."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scenario_helpers import LENGTHS, part, parts, refused, same_everywhere, scenario

from minipar.comm import Communicator
from minipar.comm.collectives import ALGORITHMS
from minipar.errors import MismatchError, UsageError
from minipar.mesh import Mesh

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
        for n in range(2):
            comm.send(np.full(4, n), 1, tag=2)
    elif comm.rank == 1:
        odd = [comm.irecv(0, tag=1) for _ in range(3)]
        even = [comm.irecv(0, tag=0, shape=(2 * n + 1,), dtype=np.int64) for n in range(3)]
        mixed = [work.wait() for work in (odd[2], odd[0], odd[1], even[1], even[0], even[2])]
        assert [int(x[0]) for x in mixed] == [5, 1, 3, 2, 0, 4]
        assert [len(x) for x in mixed] == [6, 2, 4, 3, 1, 5]
        unknown, known = comm.irecv(0, tag=2), comm.irecv(0, tag=2, shape=(4,), dtype=np.int64)
        assert known.wait()[0] == 1 and unknown.wait()[0] == 0


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
def pending_collectives_are_not_overtaken(comm: Communicator) -> None:
    """Rank 0 has begun a blocking call before any other rank has issued the one in the background."""
    if comm.rank == 0:
        work = comm.all_reduce_async(np.full(5000, 1.0))
        for rank in range(1, comm.size):
            comm.send(np.ones(1), rank)
    else:
        comm.recv(0)
        work = comm.all_reduce_async(np.full(5000, 1.0))
    assert (comm.all_reduce(np.full(5000, 3.0)) == 3 * comm.size).all()
    assert (work.wait() == comm.size).all()


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


@scenario
def a_message_may_come_after_a_pending_collective(comm: Communicator) -> None:
    """Rank 0 receives what the others send only when they have the sum: its own part of that is under way."""
    if comm.rank:
        comm.recv(0)  # so that rank 0 has begun before any other
    else:
        work = comm.all_reduce_async(np.full(5000, 1.0))
        for dest in range(1, comm.size):
            comm.send(np.ones(1), dest)
        for source in range(1, comm.size):
            assert comm.recv(source)[0] == comm.size
    if comm.rank:
        work = comm.all_reduce_async(np.full(5000, 1.0))
        comm.send(work.wait()[:1], 0)
    assert (work.wait() == comm.size).all()


@scenario
def collectives_of_two_groups_are_waited_for_in_any_order(comm: Communicator) -> None:
    """Rank 0 waits for those of two groups in the opposite order, or calls a third group before it waits."""
    first, second, third = (comm.split(0) for _ in range(3))
    works = [first.all_reduce_async(np.full(5000, 1.0)), second.all_reduce_async(np.full(5000, 2.0))]
    for work in works if comm.rank == 0 else reversed(works):
        work.wait()
    late = second.all_reduce_async(np.full(5000, 3.0))
    if comm.rank == 0:
        third.barrier()
    assert late.wait()[0] == 3 * comm.size
    if comm.rank:
        third.barrier()
    assert [work.wait()[0] for work in works] == [comm.size, 2 * comm.size]


@scenario
def more_may_be_pending_than_ranks_take_note_of_at_once(comm: Communicator) -> None:
    """Rank 0 begins all of them before another rank begins the first, and others end them in other orders."""
    if comm.rank:
        comm.recv(0)
    pending = [comm.all_reduce_async(np.full(10, float(n))) for n in range(40)]
    if comm.rank == 0:
        for dest in range(1, comm.size):
            comm.send(np.ones(1), dest)
    order = sorted(range(40), key=lambda n: (n * (comm.rank + 3)) % 41)
    assert all(pending[n].wait()[0] == n * comm.size for n in order)


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
def groups_are_freed_with_all_that_was_split_from_them(comm: Communicator) -> None:
    kept = comm.split(0)
    with comm.scope():
        half = comm.split(comm.rank % 2)
        inner = half.split(0)
        alone = comm.split(comm.rank if comm.rank else None)
        work = inner.all_reduce_async(np.ones(2))
    assert (work.wait() == inner.size).all()  # begun before
    for group in (half, inner, alone or half):
        with pytest.raises(UsageError, match=f"barrier: the group {group.name} was freed"):
            group.barrier()
        with pytest.raises(UsageError, match="all_reduce: the group"):
            group.all_reduce(np.ones(2))
        with pytest.raises(UsageError, match="send: the group"):
            group.isend(np.ones(2), 0)
    kept.barrier()
    kept.free()
    for use in (lambda: kept.split(0), kept.free, half.free):
        with pytest.raises(UsageError, match="was freed"):
            use()
    assert not {kept, half} & set(comm._groups), "what was freed is forgotten"
    if comm.name == "world":
        with pytest.raises(UsageError, match="the world lasts as long as the program"):
            comm.free()


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
def ledger_tells_two_grids_over_the_same_ranks_apart(comm: Communicator) -> None:
    n, size = 12, comm.size
    comm.ledger.reset()
    for tp in (size, 1 if size % 2 else 2):  # both name the first group world/tp0
        group = Mesh(comm, dp=size // tp, tp=tp).tp
        before = comm.ledger.ring_elements()
        group.all_reduce(np.ones(n))
        assert comm.ledger.ring_elements() - before == Fraction(2 * (tp - 1) * n, tp)
    assert sum(calls for (op, _), (calls, _, _) in comm.ledger.as_dict().items() if op == "all_reduce") == 2


@scenario
def textbook_all_reduces_are_the_same_sum(comm: Communicator) -> None:
    for name, algorithm in ALGORITHMS.items():
        for n in LENGTHS:
            x = part(comm.rank, n)
            result = algorithm(comm, x)
            assert np.array_equal(result, sum(parts(comm, n))), (name, n)
        for op, whole in (("max", np.max), ("min", np.min), ("prod", np.prod)):
            result = algorithm(comm, part(comm.rank, 6).reshape(2, 3), op)
            assert np.array_equal(result, whole(parts(comm, 6), axis=0).reshape(2, 3)), (name, op)
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
