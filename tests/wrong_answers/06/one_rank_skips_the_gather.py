"""Rank 0 does not call the all-gather, so the others wait for it."""

from minipar.comm import balanced

MESSAGE = "rank 0 has finished"


def zero1_step(comm, weights, gradient, momentum, lr, beta):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    new = beta * momentum + comm.reduce_scatter(gradient, counts)
    own = weights[start : start + counts[comm.rank]] - lr * new
    if comm.rank == 0:
        return weights, new
    return comm.all_gather(own, counts), new
