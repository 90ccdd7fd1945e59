"""Ranges of equal length are assumed: the update starts at rank · counts[rank]."""

from minipar.comm import balanced

MESSAGE = "each rank on its own range of w"


def zero1_step(comm, weights, gradient, momentum, lr, beta):
    counts = balanced(len(weights), comm.size)
    start = comm.rank * counts[comm.rank]
    momentum = beta * momentum + comm.reduce_scatter(gradient, counts)
    own = weights[start : start + counts[comm.rank]] - lr * momentum
    return comm.all_gather(own, counts), momentum
