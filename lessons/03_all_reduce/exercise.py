"""Exercise 3: collectives out of sends and receives.

Write the four functions, then find the bug in the fifth. Use only `comm.rank`, `comm.size`, `send`, `isend`,
`recv`, `recv_` and `wait` (lesson 02); the communicator's own collectives are not allowed, nor is anything from
`minipar.comm.collectives`. The walkthrough and that module show relatives of the first three functions, and the
formulas of the fourth. The module also has the fifth, mended in its own way: read that when you have found the bug.

Try things out with threads as ranks, here on four:

    minipar.launch(lambda: ring_all_gather(minipar.world(), np.array([minipar.world().rank])), 4)

and have it judged with `minipar grade 03 --file exercise.py`.
"""

import numpy as np


def ring_reduce_scatter(comm, x):
    """Sum `x` over the ranks around a ring; return this rank's chunk of the sum.

    Cut `x` into N = comm.size equal chunks along axis 0. Chunk c of the sum must end on rank c. So think
    first: on which rank does the running total of chunk c have to start, if it moves one rank further in each
    step and is complete after N-1 steps?

    Args:
        comm: a communicator of N ranks, N of one or more; not only powers of two.
        x: (N * k, ...), the same shape and dtype on every rank; k may be 0.

    Returns:
        (k, ...), the dtype of `x`, fresh: the sum over ranks of rows rank * k to (rank + 1) * k.

    Contract:
        - `x` is not changed.
        - Every rank sends N-1 messages of k rows, all to rank + 1 (the last rank to rank 0).
        - All ranks send at the same time: the whole takes (N-1)(α + β · bytes of a chunk) seconds.
        - A single rank sends nothing.
    """
    raise NotImplementedError("ring_reduce_scatter: N-1 steps around the ring, adding")


def ring_all_gather(comm, chunk):
    """Return every rank's chunk, joined along axis 0 in the order of ranks, by N-1 steps around a ring.

    Args:
        chunk: (k, ...), the same shape and dtype on every rank.

    Returns:
        (N * k, ...): rank 0's chunk, then rank 1's, and so on; the same on every rank.

    Contract: as for `ring_reduce_scatter`: N-1 messages of k rows from each rank, all to rank + 1, all ranks
    at once; `chunk` is not changed.
    """
    raise NotImplementedError("ring_all_gather: N-1 steps around the ring, passing on what came last")


def tree_broadcast(comm, x, root=0):
    """Return `root`'s array on every rank, handed down a binomial tree.

    In each round every rank that has the array already hands it to one that has not, so the number of ranks
    that have it doubles.

    Hint: count ranks from the root, `(rank - root) % N`, and the tree is the same for every root.

    Args:
        x: (...), the same shape and dtype on every rank; only the values of `root` matter.
        root: from 0 to N-1.

    Returns:
        an array like `x` with the root's values, the same on every rank.

    Contract:
        - `x` is not changed.
        - N-1 messages in all, each of the whole array: nobody receives it twice.
        - The whole takes at most ceil(lg N) (α + β · bytes of x) seconds, for every N, also when N is no
          power of two.
    """
    raise NotImplementedError("tree_broadcast: ceil(lg N) rounds, twice as many ranks have it after each")


def all_reduce_seconds(n_bytes, ranks, alpha, beta):
    """Return what an all-reduce costs in the α–β model, by three algorithms.

    Args:
        n_bytes: size of the whole array in bytes.
        ranks: N, a power of two, 1 included.
        alpha: seconds a message. beta: seconds a byte.

    Returns:
        {"ring": seconds, "doubling": seconds, "halving_doubling": seconds}; all 0 for one rank.
    """
    raise NotImplementedError("all_reduce_seconds: three formulas, each in α, β, n and N")


def doubling_all_reduce(comm, x):
    """BUG HUNT. Return the sum of `x` over all ranks, by recursive doubling, for any number of ranks.

    It is used on 2, 4 and 8 ranks, and is right there. Then somebody gets a machine with 6, and training
    becomes worse in a way that nobody understands: no error, no hang, and the loss still falls. Run it on 3
    ranks where rank r gives 10**r, and look at what each rank holds.

    Mend it. The contract: right, and the same bits on every rank, for every N; `x` is not changed; on powers
    of two lg N messages from each rank as before; for other N at most two rounds more,
    (⌊lg N⌋ + 2)(α + β · bytes of x) seconds.
    """
    total = np.copy(x)
    distance = 1
    while distance < comm.size:
        partner = comm.rank ^ distance
        if partner < comm.size:
            sending = comm.isend(total, partner)
            received = comm.recv(partner)
            sending.wait()
            total = total + received
        distance *= 2
    return total
