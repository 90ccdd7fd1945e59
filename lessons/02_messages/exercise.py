"""Exercise 2: messages that neither wait forever nor longer than they must.

Write the four functions, then find the bug in the fifth. Of the communicator only `rank`, `size`, `send`,
`isend`, `recv`, `irecv` and `wait` are needed. `send` returns when its receive has begun; on the virtual clock it
takes α + β n from its own call on, however late that receive comes. Try things out with threads as ranks, and with
a clock that counts what messages cost:

    from minipar.comm import Clock
    def program():
        comm = minipar.world()
        got = exchange(comm, np.full(100, comm.rank, np.uint8), 1 - comm.rank)
        return got[0], comm.now()                       # what came, and the virtual time in seconds
    minipar.launch(program, 2, clock=Clock(alpha=1.0, beta=0.01))       # a message of 100 bytes: 1 + 1 s

Judge it with `minipar grade 02 --file exercise.py`.
"""

import numpy as np


def exchange(comm, x, partner):
    """Send `x` to `partner`, which does the same, and return what it sent.

    Args:
        x: any shape; the partner's may have another.
        partner: a rank, possibly this one itself.

    Returns:
        The partner's array, fresh.

    Contract: never a deadlock, and both messages travel at the same time: α + β n seconds, not twice that.
    """
    raise NotImplementedError("exchange: both ranks run this same code, so what if both send first?")


def shift(comm, x, distance):
    """Pass `x` on by `distance` ranks around the ring, and return what came.

    Rank r's array goes to rank (r + distance) mod N, for any integer `distance`: 0, negative, or beyond N.

    Args:
        x: any shape and dtype, the same on every rank.

    Returns:
        The array of rank (r - distance) mod N, fresh.

    Contract: one message a rank (none is needed for a distance of 0 mod N), all at the same time:
    α + β n seconds, for every N, odd ones and 1 included.
    """
    raise NotImplementedError("shift: the destination is one way around the ring, the source the other")


def relay(comm, x, pieces):
    """Hand rank 0's array on along the chain 0 → 1 → … → N-1, in pieces, and return it on every rank.

    While rank 1 sends the first piece on to rank 2, rank 0 already sends it the second one.

    Args:
        x: (n,) on rank 0; on other ranks an array of the same shape and dtype whose values do not count.
        pieces: k, at least 1, which divides n.

    Returns:
        (n,), rank 0's values, fresh: not `x` itself on any rank.

    Contract: every rank but the last sends k messages of n / k elements, with `send`: one at a time on each
    wire. The last rank has everything after (N - 2 + k)(α + β n/k) seconds, n in bytes, for N of 2 or more.
    """
    raise NotImplementedError(
        "relay: for each piece, receive it (all but rank 0), then send it (all but the last)"
    )


def best_pieces(ranks, n_bytes, alpha, beta):
    """Return the number of pieces for which `relay` takes the least time.

    That is the whole number k of at least 1 for which (N - 2 + k)(α + β n / k) is least; whether it divides n
    is of no concern here.

    Args:
        ranks: N, 2 or more.
        n_bytes: n, above zero.
        alpha: seconds a message, above zero.
        beta: seconds a byte, above zero.

    Returns:
        int.
    """
    raise NotImplementedError("best_pieces: multiply out; which k makes the two terms with k equally large?")


def smooth(comm, u, steps):
    """THE BUG HUNT: average neighbours on a ring of cells that is spread over the ranks.

    The cells of all ranks form one ring. In each step every cell becomes (left + 2 · itself + right) / 4. A rank
    needs one cell of each of its neighbours for that: the last one of the rank to the left and the first one of
    the rank to the right.

    The code below is right on 3, 4 and 8 ranks. On 2 ranks it gives wrong numbers, and on 1 as well. Find out
    why, and mend it so that it is right on any number of ranks.

    Args:
        u: (m,) float64, this rank's cells, m of one or more.
        steps: how many steps.

    Returns:
        (m,), this rank's cells afterwards, fresh.
    """
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    u = u.copy()
    for _ in range(steps):
        to_left = comm.isend(u[:1], left)
        to_right = comm.isend(u[-1:], right)
        from_left = comm.recv(left)
        from_right = comm.recv(right)
        to_left.wait()
        to_right.wait()
        wide = np.concatenate([from_left, u, from_right])
        u = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4
    return u
